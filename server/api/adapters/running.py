"""Treatment of running requests when the name of their version moves to another one."""

from contextlib import suppress

from adapters.errors import AdapterConflict
from adapters.records import AdapterRecord, Inspected
from adapters.traits import Traits
from server.api.adapters.schemas import InFlight
from server.api.context import AppContext
from server.ipc.supervisor import EngineUnavailable


def check_switch(old: AdapterRecord | None, new: Inspected, in_flight: InFlight) -> None:
    """Raise `AdapterConflict` if running requests of `old` could not go on with `new`: their tokens would mean
    something else."""
    if old is None or in_flight != "switch":
        return
    before, after = old.version.traits, Traits.of(new.report)
    if before != after or before.tokenizer or before.eos_token:
        raise AdapterConflict(
            f"Running requests of '{old.name}' cannot switch to a version that brings a tokenizer, or has another "
            "vocabulary, other virtual tokens or other modules that it replaces. Publish it with in_flight=finish or "
            "in_flight=abort."
        )


async def replace_running(
    context: AppContext, old: AdapterRecord | None, new: AdapterRecord, in_flight: InFlight
) -> None:
    """Switch or end the requests that run on `old` because of its name. Requests that named the version itself keep
    it."""
    if old is None or in_flight == "finish" or old.version.digest == new.version.digest:
        return
    running = context.in_flight.following(old.name, old.version.digest)
    with suppress(EngineUnavailable):  # an engine that restarts has ended them
        if in_flight == "abort":
            context.engine.stop_sequences(running)
        elif running:
            context.in_flight.add_version(running, new.version.digest)
            await context.engine.switch_adapter(running, old.version.digest, new.version.digest)

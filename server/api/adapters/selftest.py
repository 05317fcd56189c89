"""The self-test of an arriving adapter: nothing is published before the engine has computed with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.errors import AdapterInvalid, Problem
from adapters.records import Inspected
from server.api.context import AppContext
from server.ipc.client import AdapterMoveRefused
from server.ipc.messages import SelfTest


@asynccontextmanager
async def tried(context: AppContext, inspected: Inspected, folder: Path) -> AsyncIterator[None]:
    """Put the result into the report. In the body the version is in the store; after it, only if it was published.

    Raises `AdapterInvalid` when the engine cannot load the adapter or does not compute what it should.
    """
    registry, digest = context.registry, inspected.digest
    await asyncio.to_thread(registry.hold, digest, folder)
    try:
        inspected.report["selftest"] = await _selftest(context, digest)
        yield
    finally:
        await asyncio.to_thread(registry.let_go, digest)
        if not registry.names_of(digest):
            context.engine.retire_adapter(digest)
            await asyncio.to_thread(registry.collect_garbage, context.in_flight.digests())


async def _selftest(context: AppContext, digest: str) -> dict[str, float | str]:
    """What the report says of it. A full device is no fault of the adapter's."""
    try:
        result = await context.engine.try_adapter(digest)
    except AdapterMoveRefused as refused:
        if refused.code == "no_room":
            return {"skipped": str(refused)}
        raise AdapterInvalid(
            [Problem("selftest", str(refused), "an adapter that can be loaded", "nonfinite")]
        ) from None
    if not result.relative_error <= result.tolerance:
        raise AdapterInvalid([_failed(result)])
    return {"max_abs_logit_diff": result.max_abs_logit_diff}


def _failed(result: SelfTest) -> Problem:
    """NaN when the adapter's weights drive the model beyond what its dtype can hold."""
    if result.relative_error != result.relative_error:
        return Problem("selftest", "logits that are not finite", "finite logits on a probe prompt", "nonfinite")
    found = f"logits off by {result.relative_error:.2g} of their spread"
    return Problem("selftest", found, f"at most {result.tolerance:.2g}, as by the reference", "base_mismatch")

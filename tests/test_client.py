"""The API's side of the engine: over a thread with a real engine, and over a transport that does as it is told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from adapters.model_spec import ModelSpec
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.faults import MAX_FAILED_STEPS
from server.engine.thread_transport import ThreadTransport
from server.ipc import client as client_module
from server.ipc import supervisor
from server.ipc.client import AdapterMoveRefused, EngineClient
from server.ipc.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Fatal,
    FromEngine,
    Merge,
    MergeStatus,
    MergeSwitch,
    MoveAdapter,
    PinAdapter,
    Progress,
    Ready,
    Reply,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToEngine,
    Unmerge,
)
from server.ipc.stream import Stream
from server.ipc.supervisor import EngineState, EngineUnavailable
from server.model.runner import ModelRunner
from server.request import SamplingParams
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import MIB, make_driver, plain
from tests.fixtures.timing import Clock, eventually, leap
from tests.test_architectures import greedy

PROMPT = [5, 9, 33, 2, 60]


def request(seq_id: str, max_tokens: int = 8, adapter: str | None = None) -> Submit:
    return Submit(seq_id, list(PROMPT), SamplingParams(max_tokens, temperature=0.0, ignore_eos=True), plain(adapter))


async def outputs_of(stream: Stream) -> list[SequenceOutput]:
    """Collect a stream of one sequence to its end."""
    outputs = await stream.take()
    while outputs[-1].finish_reason is None:
        outputs += await stream.take()
    return outputs


async def collect(stream: Stream) -> tuple[list[int], str | None]:
    outputs = await outputs_of(stream)
    return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason


# -- with an engine in a thread ----------------------------------------------------------------------------------------


@asynccontextmanager
async def client_over(model: Path, data_dir: Path) -> AsyncIterator[EngineClient]:
    config = ServeConfig(
        model=str(model), data_dir=data_dir, dtype="float32", device="cpu", kv_cache_bytes=8 * MIB, adapter_slots=2
    )
    client = EngineClient(ThreadTransport(lambda: build_engine(config)))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def test_streams_run_side_by_side(llama_folder: Path, tmp_path: Path) -> None:
    async with client_over(llama_folder, tmp_path) as client:
        assert client.state is EngineState.READY
        assert client.info is not None and client.info.vocab_size == 97
        streams = [client.submit(request(f"s{index}", 8 + index)) for index in range(4)]
        answers = await asyncio.gather(*(collect(stream) for stream in streams))
    expected = greedy(tiny_llama(), PROMPT, 11)
    assert answers == [(expected[: 8 + index], "length") for index in range(4)]


async def test_an_abort_ends_the_stream_and_only_that(llama_folder: Path, tmp_path: Path) -> None:
    async with client_over(llama_folder, tmp_path) as client:
        long, short = client.submit(request("long", 400)), client.submit(request("short"))
        await long.take()
        client.abort(["long", "never heard of"])
        assert (await collect(long))[1] == "abort"
        assert (await collect(short))[1] == "length"
        client.abort(["long"])  # it is over: no error
        await eventually(lambda: client.stats.running == 0)


async def test_adapters_are_moved_pinned_and_used(llama_folder: Path, tmp_path: Path) -> None:
    driver = make_driver(llama_folder, tmp_path)
    digest = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "adapter", scale=0.3))
    driver.submit("s", PROMPT, digest)
    driver.run()
    driver.engine.residency.close()
    async with client_over(llama_folder, tmp_path) as client:
        await client.move_adapter(digest, "host")
        await eventually(lambda: client.residency.host == [digest])
        await client.pin_adapter(digest, True)
        await eventually(lambda: client.residency.pinned.keys() == {digest})
        assert await collect(client.submit(request("s", adapter=digest))) == (driver.tokens("s"), "length")
        await client.pin_adapter(digest, False)
        await client.move_adapter(digest, "disk")
        await eventually(lambda: client.residency.device == client.residency.host == [])
        with pytest.raises(AdapterMoveRefused) as refused:
            await client.move_adapter("f" * 64, "device")
        assert refused.value.code == "invalid"


async def test_a_missing_adapter_ends_its_stream_with_a_reason(llama_folder: Path, tmp_path: Path) -> None:
    async with client_over(llama_folder, tmp_path) as client:
        outputs = await outputs_of(client.submit(request("s", adapter="f" * 64)))
    assert outputs[-1].finish_reason == "error"
    assert "adapter could not be loaded" in str(outputs[-1].error)


async def test_stopping_ends_what_runs(llama_folder: Path, tmp_path: Path) -> None:
    async with client_over(llama_folder, tmp_path) as client:
        stream = client.submit(request("s", 480))
        await stream.take()
    assert (await collect(stream))[1] in ("error", "abort")
    assert not client.is_alive()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        client.submit(request("late"))


async def test_a_model_that_cannot_be_loaded_is_reported_by_start(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="cannot be loaded"):
        async with client_over(tmp_path / "nothing here", tmp_path):
            raise AssertionError("it started")


@pytest.mark.reliability("T48")
async def test_an_engine_whose_every_step_fails_is_restarted(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_over(llama_folder, tmp_path) as client:
        with monkeypatch.context() as broken:
            broken.setattr(ModelRunner, "run", Mock(side_effect=RuntimeError("no")))
            for index in range(MAX_FAILED_STEPS):
                assert client.state is EngineState.READY
                assert await collect(client.submit(request(f"s{index}"))) == ([], "error")
            await eventually(lambda: client.state is EngineState.RESTARTING)
        with pytest.raises(EngineUnavailable, match="restarting"):
            client.submit(request("meanwhile"))
        await eventually(lambda: client.state is EngineState.READY)
        assert client.restarts == 1
        assert await collect(client.submit(request("after"))) == (greedy(tiny_llama(), PROMPT, 8), "length")


# -- with a transport that does as it is told --------------------------------------------------------------------------


class FakeTransport:
    """Keeps what was sent; the test says what the engine answers."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.starts = 0
        self.stops = 0
        self.kills = 0

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        self.starts += 1
        self.say, self.die = on_message, on_exit
        asyncio.get_running_loop().call_soon(self.say, Ready(info()))

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        self.kills += 1
        self.die("killed")

    async def stop(self) -> None:
        self.stops += 1

    def output(self, seq_id: str, *tokens: int, **end: Any) -> None:
        self.say(StepOutputs([SequenceOutput(seq_id, list(tokens), **end)], EngineStats(running=1)))


def info() -> EngineInfo:
    return EngineInfo("0" * 12, 97, 512, ModelSpec({}, 64), 2, 8, 8, 16, [2], {})


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The supervisor's, by which it knows that the engine hangs."""
    monkeypatch.setattr(supervisor, "time", made := Clock())
    return made


@pytest.fixture
async def client(transport: FakeTransport, clock: Clock) -> AsyncIterator[EngineClient]:
    made = EngineClient(transport, hang_seconds=0.2)
    await made.start()
    yield made
    await made.stop()


async def test_before_it_is_ready_nothing_is_taken(transport: FakeTransport) -> None:
    client = EngineClient(transport)
    assert client.state is EngineState.STARTING
    with pytest.raises(EngineUnavailable, match="loading"):
        client.submit(request("s"))
    with pytest.raises(EngineUnavailable):
        await client.move_adapter("a", "host")


async def test_when_the_engine_dies_every_stream_and_call_ends_and_it_starts_again(
    transport: FakeTransport, client: EngineClient
) -> None:
    streams = [client.submit(request(f"s{index}")) for index in range(3)]
    move = asyncio.create_task(client.move_adapter("a" * 64, "device"))
    await asyncio.sleep(0)
    transport.output("s0", 7)
    transport.die("killed")
    assert client.state is EngineState.RESTARTING
    with pytest.raises(EngineUnavailable, match="restarting"):
        client.submit(request("late"))
    answers = [await collect(stream) for stream in streams]
    assert answers == [([7], "error"), ([], "error"), ([], "error")]
    with pytest.raises(EngineUnavailable):
        await move
    await eventually(lambda: client.state is EngineState.READY)
    assert (transport.starts, client.restarts) == (2, 1)
    stream = client.submit(request("s0"))
    transport.output("s0", 8, finish_reason="length")
    assert await collect(stream) == ([8], "length")


@pytest.mark.reliability("T65")
async def test_pins_outlive_a_restart(transport: FakeTransport, client: EngineClient) -> None:
    for digest, pinned in (("kept", True), ("dropped", True), ("dropped", False)):
        call = asyncio.create_task(client.pin_adapter(digest, pinned))
        await asyncio.sleep(0)
        sent = transport.sent[-1]
        assert isinstance(sent, PinAdapter)
        transport.say(Reply(sent.request_id))
        await call
    transport.sent.clear()
    transport.die("killed")
    await eventually(lambda: client.state is EngineState.READY)
    assert [(m.digest, m.pinned) for m in transport.sent if isinstance(m, PinAdapter)] == [("kept", True)]


async def test_what_is_unpinned_while_the_engine_is_away_is_not_pinned_again(
    transport: FakeTransport, client: EngineClient
) -> None:
    call = asyncio.create_task(client.pin_adapter("dropped", True))
    await asyncio.sleep(0)
    transport.say(Reply(transport.sent[-1].request_id))  # type: ignore[union-attr]
    await call
    transport.sent.clear()
    transport.die("killed")
    with pytest.raises(EngineUnavailable):
        await client.pin_adapter("dropped", False)
    await eventually(lambda: client.state is EngineState.READY)
    assert not transport.sent


async def merged(transport: FakeTransport, client: EngineClient, digest: str) -> None:
    call = asyncio.create_task(client.merge(digest, drain=False, allow_requantize=True))
    await asyncio.sleep(0)
    sent = transport.sent[-1]
    assert isinstance(sent, Merge) and (sent.digest, sent.drain, sent.allow_requantize) == (digest, False, True)
    assert client.requested_merge == digest
    switches = [MergeSwitch(digest, "merge", "request")]
    transport.say(StepOutputs([], EngineStats(), merge=MergeStatus("merged", digest, "request"), switches=switches))
    transport.say(Reply(sent.request_id))
    await call


async def test_a_merge_outlives_a_restart_and_then_waits_for_others(
    transport: FakeTransport, client: EngineClient
) -> None:
    await merged(transport, client, "a")
    assert client.merge_status.state == "merged"
    transport.die("killed")
    assert client.merge_status == MergeStatus() and client.requested_merge == "a"
    await eventually(lambda: isinstance(transport.sent[-1], Merge) and transport.sent[-1].drain)
    transport.die("killed")  # before it was answered
    transport.sent.clear()
    await eventually(lambda: any(isinstance(sent, Merge) for sent in transport.sent))
    again = transport.sent[-1]
    assert isinstance(again, Merge) and again.digest == "a" and again.drain and again.allow_requantize
    transport.say(Reply(again.request_id, ("no_room", "the memory is gone")))
    await eventually(lambda: client.requested_merge is None)


async def test_a_merge_that_gave_way_or_was_retired_or_refused_is_not_asked_for_again(
    transport: FakeTransport, client: EngineClient
) -> None:
    await merged(transport, client, "a")
    transport.say(StepOutputs([], EngineStats(), merge=MergeStatus(), switches=[MergeSwitch("a", "unmerge", "others")]))
    assert client.requested_merge is None
    await merged(transport, client, "a")
    client.retire_adapter("a")
    assert client.requested_merge is None
    call = asyncio.create_task(client.merge("b", drain=False, allow_requantize=False))
    await asyncio.sleep(0)
    sent = transport.sent[-1]
    assert isinstance(sent, Merge)
    transport.say(Reply(sent.request_id, ("busy", "others are in flight")))
    with pytest.raises(AdapterMoveRefused, match="in flight"):
        await call
    assert client.requested_merge is None


@pytest.mark.reliability("T61")
async def test_an_engine_that_stops_stepping_is_replaced(
    transport: FakeTransport, client: EngineClient, clock: Clock
) -> None:
    clock.now += 0.4
    assert client.is_alive()  # without work, silence is no sign of anything
    stream = client.submit(request("s"))
    assert client.is_alive()
    clock.now += 0.15
    transport.output("s", 1)
    clock.now += 0.15
    assert client.is_alive()  # it made a step in between
    await asyncio.sleep(0.1)  # the client looks every 0.05 s
    assert transport.kills == 0
    clock.now += 0.1
    assert not client.is_alive()
    assert (await collect(stream)) == ([1], "error")
    await eventually(lambda: client.state is EngineState.READY)
    assert (transport.kills, transport.starts) == (1, 2)
    assert client.is_alive()


async def test_an_engine_that_cannot_go_on_is_not_started_again(transport: FakeTransport, client: EngineClient) -> None:
    stream = client.submit(request("s"))
    transport.say(Fatal("the disk is gone"))
    transport.die("status 1")
    assert await collect(stream) == ([], "error")
    assert (client.state, transport.starts) == (EngineState.DEAD, 1)
    assert not client.is_alive()
    with pytest.raises(EngineUnavailable, match="the disk is gone"):
        client.submit(request("late"))


async def test_a_refused_move_raises_its_code(transport: FakeTransport, client: EngineClient) -> None:
    call = asyncio.create_task(client.move_adapter("a", "disk"))
    await asyncio.sleep(0)
    sent = transport.sent[-1]
    assert isinstance(sent, MoveAdapter)
    transport.say(Reply(sent.request_id, ("busy", "the adapter is in use")))
    with pytest.raises(AdapterMoveRefused, match="in use") as refused:
        await call
    assert refused.value.code == "busy"


async def test_listeners_hear_every_step_and_strangers_are_ignored(
    transport: FakeTransport, client: EngineClient
) -> None:
    heard: list[StepOutputs] = []
    client.add_listener(heard.append)
    transport.output("nobody", 1)
    transport.say(Reply(12345))
    assert len(heard) == 1
    assert client.stats.running == 1


async def test_who_waits_is_counted_until_its_first_output_or_its_end(
    transport: FakeTransport, client: EngineClient
) -> None:
    for name, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        client.submit(Submit(name, [1, 2, 3], SamplingParams(4), cache_salt=tenant, weight=2.0))
    assert (client.waiting.sequences("x"), client.waiting.tokens("x"), client.waiting.heaviest()) == (2, 6, 2.0)
    transport.output("a", 5)
    transport.output("c", finish_reason="abort")
    assert (client.waiting.sequences("x"), client.waiting.sequences("y")) == (1, 0)
    transport.output("a", 5, finish_reason="length")
    assert client.waiting.sequences() == 1
    transport.die("it died")
    assert client.waiting.sequences() == 0


async def test_only_running_sequences_are_aborted(transport: FakeTransport, client: EngineClient) -> None:
    client.submit(request("a"))
    over = client.submit(request("b"))
    transport.output("b", finish_reason="length")
    await collect(over)
    transport.sent.clear()
    client.abort(["b"])
    client.abort(["a", "b"])
    assert transport.sent == [Abort(["a"])]


# -- restarts that fail, hangs and deadlines ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_BACKOFF_SECONDS", (0.0,))


async def starts(transport: FakeTransport, *how: str) -> list[str]:
    """Let the next starts of the engine go like this; returns the list of those still to come."""
    left = list(how)
    start = transport.start

    async def scripted(on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        kind = left.pop(0) if left else "ready"
        if kind == "ready":
            await start(on_message, on_exit)
            return
        transport.starts += 1
        transport.say, transport.die = on_message, on_exit
        if kind == "raises":
            raise OSError(28, "no space left on device")
        if kind == "refused":
            on_message(Fatal("the KV cache holds no tokens"))
        if kind in ("refused", "dies"):
            on_exit("status 1")

    transport.start = scripted  # type: ignore[method-assign]
    return left


@pytest.mark.parametrize("how", ["raises", "refused", "dies"])
async def test_a_restart_that_fails_is_tried_again(
    transport: FakeTransport, client: EngineClient, quick: None, how: str
) -> None:
    await starts(transport, how, how)
    transport.die("killed")
    assert client.state is EngineState.RESTARTING and client.is_alive()
    await eventually(lambda: client.state is EngineState.READY)
    assert (transport.starts, client.restarts) == (4, 3) and client.is_alive()


async def test_why_a_restart_fails_is_said_meanwhile(
    transport: FakeTransport, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_BACKOFF_SECONDS", (0.0, 600.0))
    await starts(transport, "refused")
    transport.die("killed")
    await eventually(lambda: transport.starts == 2)
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailable, match=r"tried again: the KV cache holds no tokens"):
        client.submit(request("s"))


async def test_a_restarted_engine_that_does_not_get_ready_is_restarted(
    transport: FakeTransport, client: EngineClient, clock: Clock, quick: None
) -> None:
    await starts(transport, "silent", "silent")
    transport.die("killed")
    await eventually(lambda: transport.starts == 2)
    await asyncio.sleep(0.12)  # the client looks every 0.05 s
    assert transport.kills == 0, "it has the time of a start"

    def is_ready() -> bool:
        clock.now += 0.21
        return client.state is EngineState.READY

    await eventually(is_ready)
    assert (transport.starts, transport.kills) == (4, 2)


async def test_an_engine_that_cannot_be_restarted_is_not_alive_and_still_tried(
    transport: FakeTransport, client: EngineClient, quick: None
) -> None:
    failing = supervisor.MAX_FAILED_RESTARTS
    await starts(transport, *["raises"] * failing, "silent")
    transport.die("killed")
    assert client.is_alive()
    await eventually(lambda: transport.starts == 1 + failing + 1)
    assert not client.is_alive()
    transport.die("status 1")
    await eventually(lambda: client.state is EngineState.READY)
    assert client.is_alive()


async def test_the_wait_before_a_restart_grows_until_a_token_is_computed(
    transport: FakeTransport, client: EngineClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_BACKOFF_SECONDS", (0.0, 0.001, 0.002))
    for _ in range(3):
        transport.die("killed")
        await eventually(lambda: client.state is EngineState.READY)
    client.submit(request("s"))
    transport.output("s", 1)
    transport.die("killed")
    assert [record.args[1] for record in caplog.records if "is restarted in" in record.msg] == [0.0, 0.001, 0.002, 0.0]  # type: ignore[index]


async def test_reports_of_an_engine_that_has_ended_are_ignored(transport: FakeTransport, client: EngineClient) -> None:
    say, die = transport.say, transport.die
    die("killed")
    say(Ready(info()))
    assert client.state is EngineState.RESTARTING
    await eventually(lambda: client.state is EngineState.READY)
    die("killed once more")
    assert (client.state, transport.starts) == (EngineState.READY, 2)


CALLS: dict[str, Callable[[EngineClient], Coroutine[Any, Any, Any]]] = {
    "move": lambda client: client.move_adapter("d", "device"),
    "pin": lambda client: client.pin_adapter("d", True),
    "selftest": lambda client: client.run_selftest("d"),
    "merge": lambda client: client.merge("d", drain=True, allow_requantize=False),
    "unmerge": lambda client: client.unmerge(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_hang_is_noticed_when_only_a_reply_is_due(
    transport: FakeTransport, client: EngineClient, clock: Clock, call: str
) -> None:
    clock.now += 0.4  # idle
    waiting = asyncio.create_task(CALLS[call](client))
    await asyncio.sleep(0.06)
    assert client.is_alive() and transport.kills == 0
    clock.now += 0.3
    assert not client.is_alive()
    with pytest.raises(EngineUnavailable):
        await waiting
    assert transport.kills == 1
    await eventually(lambda: client.state is EngineState.READY)
    assert client.is_alive()


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_has_a_deadline_and_is_taken_back(
    transport: FakeTransport, client: EngineClient, call: str
) -> None:
    waiting = asyncio.create_task(CALLS[call](client))
    await asyncio.sleep(0)
    leap(client_module.MERGE_SECONDS + 1)
    with pytest.raises(AdapterMoveRefused, match="did not complete") as refused:
        await waiting
    assert refused.value.code == "timeout" and client.requested_merge is None
    taken_back = {"pin": PinAdapter, "merge": Unmerge}
    assert [type(sent) for sent in transport.sent[1:]] == [taken_back[call] for _ in range(call in taken_back)]


@pytest.mark.reliability("T61")
async def test_a_layer_of_a_long_step_is_progress(transport: FakeTransport, client: EngineClient, clock: Clock) -> None:
    stream = client.submit(request("s"))
    for _ in range(5):
        clock.now += 0.15
        await asyncio.sleep(0.06)
        transport.say(Progress())
    assert client.is_alive() and transport.kills == 0
    transport.output("s", 1, finish_reason="length")
    assert await collect(stream) == ([1], "length")

"""The engine in a child process: it serves, it dies, it hangs, it is replaced, and it leaves nothing behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest

from server.config import ServeConfig
from server.ipc import process_transport as process
from server.ipc import supervisor
from server.ipc.client import EngineClient
from server.ipc.messages import SequenceOutput
from server.ipc.process_transport import ProcessTransport
from server.ipc.stream import Stream
from server.ipc.supervisor import EngineState, EngineUnavailable
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import MIB, make_driver
from tests.fixtures.timing import HANG_SECONDS, Clock, eventually, wait_for
from tests.test_architectures import greedy
from tests.test_client import PROMPT, collect, request

ROOT = Path(__file__).parent.parent


def make_transport(model: Path, data_dir: Path) -> ProcessTransport:
    return ProcessTransport(
        ServeConfig(
            model=str(model),
            data_dir=data_dir,
            dtype="float32",
            device="cpu",
            kv_cache_bytes=8 * MIB,
            adapter_slots=2,
            threads=1,
        )
    )


def is_gone(pid: int) -> bool:
    """An orphan that nobody waits for stays a zombie."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def first(stream: Stream) -> SequenceOutput:
    return (await stream.take())[0]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Ends the clients of a test that did not get to do it."""
    async with AsyncExitStack() as made:
        yield made


@pytest.mark.reliability("T60")
@pytest.mark.slow
async def test_a_killed_engine_is_noticed_replaced_and_leaves_nothing_behind(
    llama_folder: Path, tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", HANG_SECONDS)
    driver = make_driver(llama_folder, tmp_path)
    digest = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "adapter", scale=0.3))
    driver.submit("s", PROMPT, digest)
    driver.run()
    driver.engine.residency.close()

    transport = make_transport(llama_folder, tmp_path)
    client = EngineClient(transport)
    stack.push_async_callback(client.stop)
    await client.start()
    assert client.state is EngineState.READY
    assert transport.pid is not None and transport.pid != os.getpid()
    await client.move_adapter(digest, "device")
    base, lora = client.submit(request("base")), client.submit(request("lora", adapter=digest))
    assert await collect(base) == (greedy(tiny_llama(), PROMPT, 8), "length")
    assert await collect(lora) == (driver.tokens("s"), "length")
    aborted = client.submit(request("aborted", 480))
    await first(aborted)
    client.abort(["aborted"])
    assert (await collect(aborted))[1] == "abort"

    killed, folders = transport.pid, {transport.folder}
    streams = [client.submit(request(f"s{index}", 480)) for index in range(5)]
    for stream in streams:
        await first(stream)
    os.kill(killed, signal.SIGKILL)
    started = time.monotonic()
    for stream in streams:
        assert (await collect(stream))[1] == "error"
    noticed = time.monotonic() - started
    assert client.state is EngineState.RESTARTING
    with pytest.raises(EngineUnavailable, match="restarting"):
        client.submit(request("too early"))
    await eventually(lambda: client.state is EngineState.READY)
    assert noticed < (time.monotonic() - started) / 5  # of a start, most of which is importing torch: it is at once
    assert await collect(client.submit(request("after"))) == (greedy(tiny_llama(), PROMPT, 8), "length")

    second = transport.pid
    folders.add(transport.folder)
    running = client.submit(request("running", 480))
    await first(running)
    await client.stop()
    assert (await collect(running))[1] in ("error", "abort")
    assert second is not None and is_gone(killed) and is_gone(second)
    assert transport._process is not None and transport._process.returncode == 0  # it went by itself
    assert len(folders) == 2 and not any(folder is not None and folder.exists() for folder in folders)


@pytest.mark.reliability("T61")
@pytest.mark.slow
async def test_an_engine_that_hangs_is_replaced(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "time", clock := Clock())
    transport = make_transport(llama_folder, tmp_path)
    client = EngineClient(transport, hang_seconds=60.0)
    await client.start()
    try:
        hung = transport.pid
        assert hung is not None
        stream = client.submit(request("s", 480))
        await first(stream)
        os.kill(hung, signal.SIGSTOP)
        assert client.is_alive()
        alive: list[bool] = []

        def is_replaced() -> bool:
            clock.now += 61  # once more after what it had said before it was stopped
            alive.append(client.is_alive())
            return client.state is EngineState.RESTARTING

        await eventually(is_replaced)
        assert not all(alive)
        assert (await collect(stream))[1] == "error"
        await eventually(lambda: client.state is EngineState.READY)
        assert client.is_alive() and is_gone(hung)
        assert (await collect(client.submit(request("after"))))[1] == "length"
    finally:
        await client.stop()


async def test_a_request_in_the_moment_of_death_ends_with_an_error(llama_folder: Path, tmp_path: Path) -> None:
    """The child is gone, and nobody has noticed yet."""
    transport = make_transport(llama_folder, tmp_path)
    client = EngineClient(transport)
    await client.start()
    try:
        assert transport.pid is not None
        os.kill(pid := transport.pid, signal.SIGKILL)
        wait_for(lambda: is_gone(pid), "its end")  # the event loop does not get to run
        assert client.state is EngineState.READY
        assert await collect(client.submit(request("s"))) == ([], "error")
    finally:
        await client.stop()


async def test_an_engine_that_breaks_says_whose_fault_it_was_and_is_replaced(tmp_path: Path) -> None:
    transport = ProcessTransport(ServeConfig(model="none", data_dir=tmp_path), "tests.fixtures.broken_engine")
    client = EngineClient(transport)
    await client.start()
    try:
        broken = transport.pid
        guilty, other = client.submit(request("guilty")), client.submit(request("other"))
        assert [output.error for output in await guilty.take()] == ["your fault"]
        assert [output.error for output in await other.take()] == ["the engine died and is restarting; try again"]
        await eventually(lambda: client.state is EngineState.READY)
        assert broken is not None and is_gone(broken) and transport.pid != broken
    finally:
        await client.stop()


@pytest.mark.reliability("T64")
async def test_stopping_while_the_model_loads_leaves_nothing_behind(llama_folder: Path, tmp_path: Path) -> None:
    transport = make_transport(llama_folder, tmp_path)
    client = EngineClient(transport)
    starting = asyncio.create_task(client.start())
    await eventually(lambda: transport.pid is not None)
    pid, folder = transport.pid, transport.folder
    await client.stop()
    assert pid is not None and is_gone(pid)
    assert folder is not None and not folder.exists()
    starting.cancel()


async def test_the_child_that_was_spawned_ahead_is_the_one_that_serves(llama_folder: Path, tmp_path: Path) -> None:
    transport = make_transport(llama_folder, tmp_path)
    transport.spawn()
    pid, folder = transport.pid, transport.folder
    client = EngineClient(transport)
    await client.start()
    assert transport.pid == pid and transport.folder == folder
    assert await collect(client.submit(request("s"))) == (greedy(tiny_llama(), PROMPT, 8), "length")
    await client.stop()
    assert pid is not None and is_gone(pid) and folder is not None and not folder.exists()


def test_an_abandoned_child_leaves_nothing_behind(tmp_path: Path) -> None:
    transport = make_transport(tmp_path / "nothing here", tmp_path)
    transport.spawn()
    pid, folder = transport.pid, transport.folder
    assert pid is not None and folder is not None and folder.exists()
    transport.abandon()
    assert is_gone(pid) and not folder.exists()


async def test_a_model_that_cannot_be_loaded_is_reported_by_start(tmp_path: Path) -> None:
    transport = make_transport(tmp_path / "nothing here", tmp_path)
    client = EngineClient(transport)
    with pytest.raises(EngineUnavailable, match=r"nothing here. cannot be loaded"):
        await client.start()
    assert client.state is EngineState.DEAD
    assert client.restarts == 0
    await client.stop()
    assert transport.pid is not None and is_gone(transport.pid)


PARENT = """
import asyncio, sys
from pathlib import Path
from server.config import ServeConfig
from server.ipc import supervisor
from server.ipc import process_transport as process
from server.ipc.client import EngineClient
from server.ipc.process_transport import ProcessTransport

async def main():
    transport = ProcessTransport(ServeConfig(model=sys.argv[1], data_dir=Path(sys.argv[2]), kv_cache_bytes=1 << 22))
    await EngineClient(transport).start()
    print(transport.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_goes_when_its_parent_is_killed(llama_folder: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PARENT, str(llama_folder), str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        folder = Path(psutil.Process(child).cmdline()[-1])
        assert not is_gone(child) and folder.exists()
        parent.kill()
    wait_for(lambda: is_gone(child), "the orphaned engine's end")
    assert not folder.exists()

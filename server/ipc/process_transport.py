"""The engine in a process of its own: the transport on this side, `main` on that side.

Two ZeroMQ sockets in a private folder carry msgpack (never pickle). The child's standard input is a pipe from the
parent: it carries the config, and its end tells the child that the parent is gone, however it went.
"""

import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from server import config as settings
from server.config import ServeConfig
from server.engine.machine import cpu_quota, schedulable_cores
from server.ipc.messages import (
    Emit,
    Fatal,
    FromEngine,
    Ready,
    Receive,
    Shutdown,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)

log = logging.getLogger(__name__)

LONGEST_SOCKET_PATH = 107  # bytes
STOP_SECONDS = 5.0  # how long an engine gets to end by itself


class ProcessTransport:
    """Starts the child, and again after each death when asked to."""

    def __init__(self, config: ServeConfig, child: str = "server.ipc.process_transport"):
        """`child` is the module that is run; it calls `main`."""
        self._config = config
        self._child = child
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ahead = False  # the child was spawned and awaits `start`
        self._outbox: zmq.Socket[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def spawn(self) -> None:
        """Start the child ahead of `start`: it loads the model, and what it says is kept."""
        self._folder = Path(tempfile.mkdtemp(prefix="loraplex-"))  # mode 0700: nobody else can connect
        self._process = _spawn(self._child, self._config, self._folder)
        self._is_ahead = True

    def abandon(self) -> None:
        """End a child that was spawned and never started."""
        if self._is_ahead and self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._folder or "", ignore_errors=True)

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        if not self._is_ahead:
            await self._clean_up()
            self.spawn()
        assert self._process is not None and self._folder is not None
        self._is_ahead = False
        self._outbox = zmq.Context.instance().socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.bind(_address(self._folder, "to-engine"))
        inbox = zmq.asyncio.Context.instance().socket(zmq.PULL)
        inbox.set_hwm(0)
        inbox.bind(_address(self._folder, "from-engine"))
        self._tasks = [
            asyncio.create_task(_receive(inbox, on_message)),
            asyncio.create_task(self._watch(self._process, on_exit)),
        ]

    def send(self, message: ToEngine) -> None:
        with suppress(zmq.Again):  # the child is gone, which `on_exit` is about to say
            self._send(message)

    def _send(self, message: ToEngine) -> None:
        if self._outbox is not None:
            self._outbox.send(encode(message), zmq.NOBLOCK)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            for task in self._tasks[1:]:
                task.cancel()  # this death is meant
            try:
                self._send(Shutdown())
            except zmq.Again:  # it has not connected yet, so it cannot be asked
                self._process.kill()
            await asyncio.to_thread(_end, self._process)
        await self._clean_up()

    async def _watch(self, process: "subprocess.Popen[bytes]", on_exit: Callable[[str], None]) -> None:
        """A thread waits for the child, so that its death is known at once."""
        loop = asyncio.get_running_loop()
        died = loop.create_future()
        threading.Thread(target=lambda: _report_exit(process, loop, died), name="engine-watcher", daemon=True).start()
        on_exit(f"the engine process ended with status {await died}")

    async def _clean_up(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = []
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._outbox is not None:
            self._outbox.close(linger=0)
            self._outbox = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _address(folder: Path, name: str) -> str:
    """The address of the socket `name` in `folder`. A path that is too long for a socket goes through a descriptor."""
    path = f"{folder}/{name}"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        path = f"/proc/self/fd/{_descriptor(folder.parent)}/{folder.name}/{name}"
    return f"ipc://{path}"


@cache
def _descriptor(folder: Path) -> int:
    """A descriptor that stays open, as the sockets need it to their end."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _report_exit(process: "subprocess.Popen[bytes]", loop: asyncio.AbstractEventLoop, died: Any) -> None:
    status = process.wait()
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: None if died.done() else died.set_result(status))


async def _receive(inbox: "zmq.asyncio.Socket", on_message: Callable[[FromEngine], None]) -> None:
    try:
        while True:
            on_message(decode_from_engine(await inbox.recv()))
    finally:
        inbox.close(linger=0)


def _spawn(module: str, config: ServeConfig, folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings.to_dict(config)).encode() + b"\n")
    process.stdin.flush()
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# -- the child ---------------------------------------------------------------------------------------------------------


def main(serve: Callable[[ServeConfig, Receive, Emit], None] | None = None) -> None:
    """Connect to the parent and run `serve` (the engine, unless told otherwise) until it returns."""
    config = settings.load(json.loads(sys.stdin.buffer.readline()))
    folder = sys.argv[1]
    threading.Thread(target=_exit_with_parent, args=[folder], daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, name in ((inbox, "to-engine"), (outbox, "from-engine")):
        socket.set_hwm(0)
        socket.connect(_address(Path(folder), name))

    def emit(message: FromEngine) -> None:
        outbox.send(encode(message))

    (serve or _serve)(config, lambda timeout: _take_all(inbox, timeout), emit)
    outbox.close(linger=1000)
    inbox.close(linger=0)


def _serve(config: ServeConfig, receive: Receive, emit: Emit) -> None:
    _bind_threads(config)
    from server.engine.build import build_engine  # torch, after what OpenMP reads; the parent spawns before it has it
    from server.engine.loop import run_loop
    from server.engine.threads import adaptive_threads
    from server.logs import configure_logging
    from server.model.loading.loader import ModelRefused

    configure_logging(config.log_format)
    try:
        engine, info = build_engine(config)
    except ModelRefused as refused:
        emit(Fatal(str(refused)))
        return
    _keep_steps_short()
    emit(Ready(info))
    if config.threads:  # the operator has decided
        run_loop(engine, receive, emit)
    else:
        run_loop(engine, receive, emit, adaptive_threads(info.description["device"]))


def _bind_threads(config: ServeConfig) -> None:
    """Where the model has every core, each of its threads keeps to one. Beside a thread that reads adapters, the kernel
    at times woke two of them on one core and left them there for a step or two, which took 300 ms instead of 100.
    OpenMP reads this when torch is loaded; what an operator has set holds."""
    if sys.platform != "linux" or config.device == "cuda" or Path("/dev/nvidiactl").exists():
        return
    cores = schedulable_cores()
    has_all = config.threads in (0, cores) and cpu_quota() >= cores and "OMP_NUM_THREADS" not in os.environ
    if has_all:  # several servers with a few threads each would all be bound to the first cores
        os.environ.setdefault("OMP_PROC_BIND", "true")


def _keep_steps_short() -> None:
    """A full garbage collection would go through all of torch and transformers, 0.3 s in which no step can run. And a
    step that waits for the interpreter while an adapter is read gets it after half a millisecond, not after five."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.0005)


def _take_all(inbox: "zmq.Socket[bytes]", timeout: float) -> list[ToEngine]:
    received: list[ToEngine] = []
    if timeout and not inbox.poll(int(timeout * 1000)):
        return received
    while True:
        try:
            received.append(decode_to_engine(inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return received


def _exit_with_parent(folder: str) -> None:
    while os.read(sys.stdin.fileno(), 1):  # not the buffered reader: its lock would outlive the interpreter
        pass
    shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed could not
    os._exit(0)


if __name__ == "__main__":
    main()

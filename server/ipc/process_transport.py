"""Transport to an engine in a child process: the API side. The child's side is server/engine/worker.py.

Two ZeroMQ sockets in a private folder carry msgpack (never pickle). The child's standard input is a pipe from the
parent: it carries the config, and its end tells the child that the parent has ended for whatever reason.
"""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from adapters.fault_points import fault_point
from server import config as settings
from server.config import ServeConfig
from server.ipc.messages import (
    FromEngine,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
)
from server.ipc.socket_folder import SocketFolder
from server.ipc.sockets import address

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0  # time for the engine to end by itself
LAST_WORDS_SECONDS = 0.2  # an ended child whose messages have not come for this long has no more


class ProcessTransport:
    """Starts the child process, and starts it again after it has died if `start` is called again."""

    def __init__(self, config: ServeConfig, child: str = "server.engine.worker"):
        """Prepare the transport. `child` is the module to run; it calls `worker.main`."""
        self._config = config
        self._child = child
        self._sockets: SocketFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._received = 0  # messages, of all children
        self._is_ahead = False  # the child was spawned and awaits `start`
        self._outbox: zmq.Socket[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def folder(self) -> Path | None:
        """The folder of the sockets, if there is a child."""
        return self._sockets.path if self._sockets is not None else None

    def spawn(self) -> None:
        """Start the child ahead of `start`, so that it loads the model; its messages are queued."""
        self._sockets = SocketFolder()
        self._process = _spawn(self._child, self._config, self._sockets.path)
        self._is_ahead = True

    def abandon(self) -> None:
        """End a child that was spawned without a call of `start`."""
        if self._is_ahead and self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            if self._sockets is not None:
                self._sockets.remove()

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        if not self._is_ahead:
            await self._clean_up()
            self.spawn()
        assert self._process is not None and self.folder is not None
        self._is_ahead = False
        self._outbox = zmq.Context.instance().socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        # Connected, not bound: a bound socket drops what is sent before its peer has connected.
        self._outbox.connect(address(self.folder, "to-engine"))
        inbox = zmq.asyncio.Context.instance().socket(zmq.PULL)
        inbox.set_hwm(0)
        inbox.bind(address(self.folder, "from-engine"))
        self._tasks = [
            asyncio.create_task(self._receive(inbox, on_message)),
            asyncio.create_task(self._watch(self._process, on_exit)),
        ]

    def send(self, message: ToEngine) -> None:
        """Send a message. If the child is gone, nobody receives it, and `on_exit` is about to say so."""
        fault_point("ipc.to_engine")
        if self._outbox is not None:
            self._outbox.send(encode(message), zmq.NOBLOCK)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            for task in self._tasks[1:]:
                task.cancel()  # this exit is intended
            self.send(Shutdown())
            await asyncio.to_thread(_end, self._process)
        await self._clean_up()

    async def _watch(self, process: "subprocess.Popen[bytes]", on_exit: Callable[[str], None]) -> None:
        """Wait for the child in a thread, so that its end is noticed immediately."""
        loop = asyncio.get_running_loop()
        died = loop.create_future()
        threading.Thread(target=lambda: _report_exit(process, loop, died), name="engine-watcher", daemon=True).start()
        status = await died
        received = -1
        while received != self._received:
            received = self._received
            await asyncio.sleep(LAST_WORDS_SECONDS)
        on_exit(f"the engine process ended with status {status}")

    async def _receive(self, inbox: "zmq.asyncio.Socket", on_message: Callable[[FromEngine], None]) -> None:
        try:
            while True:
                message = decode_from_engine(await inbox.recv())
                self._received += 1
                try:
                    on_message(message)
                except Exception:  # later messages must arrive, whatever a listener does with this one
                    log.exception("%s from the engine could not be handled", type(message).__name__)
        finally:
            inbox.close(linger=0)

    async def _clean_up(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = []
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            if self._process.poll() is None:  # its start failed half-way
                self._process.kill()
        if self._outbox is not None:
            self._outbox.close(linger=0)
            self._outbox = None
        if self._sockets is not None:
            self._sockets.remove()
            self._sockets = None


def _report_exit(process: "subprocess.Popen[bytes]", loop: asyncio.AbstractEventLoop, died: Any) -> None:
    status = process.wait()
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: None if died.done() else died.set_result(status))


def _spawn(module: str, config: ServeConfig, folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # the parent handles Ctrl-C in the terminal
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

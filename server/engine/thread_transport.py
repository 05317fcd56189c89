"""The transport that runs the engine in a thread of this process, for debugging and tests."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from server.engine.engine import Engine
from server.engine.loop import run_loop
from server.ipc.messages import (
    EngineInfo,
    Fatal,
    FromEngine,
    Ready,
    Shutdown,
    ToEngine,
)
from server.model.loading.loader import ModelRefused

log = logging.getLogger(__name__)


class ThreadTransport:
    """Runs the engine in a thread of this process, for tests and debugging. It cannot be killed."""

    def __init__(self, build: Callable[[], tuple[Engine, EngineInfo]]):
        self._build = build
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.engine: Engine | None = None

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self._inbox = queue.SimpleQueue()  # messages to an earlier engine are discarded

        def emit(message: FromEngine) -> None:
            loop.call_soon_threadsafe(on_message, message)

        def refuse(reason: str) -> None:
            on_message(Fatal(reason))
            on_exit("the model was refused")

        def run() -> None:
            try:
                self.engine, info = self._build()
                emit(Ready(info))
                run_loop(self.engine, self._receive, emit)
            except ModelRefused as refused:
                loop.call_soon_threadsafe(refuse, str(refused))
            except Exception as error:
                log.exception("the engine thread died")
                loop.call_soon_threadsafe(on_exit, repr(error))

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def kill(self) -> None:
        """Do nothing: a thread cannot be killed. Run the engine in a process where this matters."""

    async def stop(self) -> None:
        if self._thread is not None:
            self._inbox.put(Shutdown())
            await asyncio.to_thread(self._thread.join)

    def _receive(self, timeout: float) -> list[ToEngine]:
        received: list[ToEngine] = []
        try:
            received.append(self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait())
            while True:
                received.append(self._inbox.get_nowait())
        except queue.Empty:
            return received

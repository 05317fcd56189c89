"""The loop around an engine, and the transport that runs it in a thread of this process."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

from server.engine.engine import Engine
from server.ipc.messages import (
    Emit,
    EngineInfo,
    Fatal,
    FromEngine,
    Ready,
    Receive,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from server.model.loading.loader import ModelRefused

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # how long an engine without work waits for a message at a time
LOADING_SECONDS = 0.002  # the same while everything waits for adapters that are on their way
HEARTBEAT_SECONDS = 0.5  # an engine with work says something at least this often


def run_loop(
    engine: Engine, receive: Receive, emit: Emit, after_step: Callable[[float], None] = lambda _: None
) -> None:
    """Step while there is work, sleep while there is none, until told to shut down. `after_step` is called with the
    seconds that a step took."""
    last_emitted = 0.0
    wait = 0.0
    while True:
        for message in receive(wait):
            if isinstance(message, Shutdown):
                engine.close()
                return
            engine.handle(message)
        if not engine.has_work():
            wait = IDLE_SECONDS
            continue
        ran = False
        for said in engine.step():
            if isinstance(said, StepOutputs) and said.stats.batch_tokens > 0:
                ran = True
                after_step(said.stats.step_seconds)
            if _worth_saying(said) or time.monotonic() - last_emitted > HEARTBEAT_SECONDS:
                emit(said)
                last_emitted = time.monotonic()
        wait = 0.0 if ran else LOADING_SECONDS


def _worth_saying(message: FromEngine) -> bool:
    """A step in which everything waited says nothing new."""
    if not isinstance(message, StepOutputs):
        return True
    news = message.outputs or message.moves or message.residency or message.merge
    return bool(news or message.stats.batch_tokens)


class ThreadTransport:
    """Runs the engine in a thread of this process: for tests and debugging. Cannot be restarted after a crash."""

    def __init__(self, build: Callable[[], tuple[Engine, EngineInfo]]):
        self._build = build
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.engine: Engine | None = None

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self._inbox = queue.SimpleQueue()  # what was sent to the last engine is not for this one

        def emit(message: FromEngine) -> None:
            loop.call_soon_threadsafe(on_message, message)

        def run() -> None:
            try:
                self.engine, info = self._build()
                emit(Ready(info))
                run_loop(self.engine, self._receive, emit)
            except ModelRefused as refused:
                emit(Fatal(str(refused)))
            except Exception as error:
                log.exception("the engine thread died")
                loop.call_soon_threadsafe(on_exit, repr(error))

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def kill(self) -> None:
        """A thread cannot be ended from outside; whoever needs that runs the engine in a process."""

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

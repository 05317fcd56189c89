"""The engine's loop, and the transport that runs it in a thread of this process."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

from server.engine.engine import Engine
from server.engine.faults import EngineBroken
from server.ipc.messages import (
    Emit,
    EngineInfo,
    Fatal,
    FromEngine,
    Progress,
    Ready,
    Receive,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from server.model.loading.loader import ModelRefused

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # how long an idle engine waits for a message at a time
LOADING_SECONDS = 0.002  # the same while all sequences wait for adapters to load
HEARTBEAT_SECONDS = 0.5  # an engine with work emits a message at least this often


def run_loop(
    engine: Engine, receive: Receive, emit: Emit, after_step: Callable[[float], None] = lambda _: None
) -> None:
    """Run steps while there is work, and wait for messages otherwise, until `Shutdown`. `after_step` receives the
    duration of each step in seconds. Raises `EngineBroken` if the engine cannot continue."""
    last_emitted = 0.0
    wait = 0.0

    def in_a_step() -> None:
        nonlocal last_emitted
        if time.monotonic() - last_emitted > HEARTBEAT_SECONDS:
            emit(Progress())
            last_emitted = time.monotonic()

    engine.progress.report = in_a_step
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
        for emitted in engine.step():
            if isinstance(emitted, StepOutputs) and emitted.stats.batch_tokens > 0:
                ran = True
                after_step(emitted.stats.step_seconds)
            if _has_news(emitted) or time.monotonic() - last_emitted > HEARTBEAT_SECONDS:
                emit(emitted)
                last_emitted = time.monotonic()
        if engine.broken is not None:
            raise EngineBroken(engine.broken)
        wait = 0.0 if ran else LOADING_SECONDS


def _has_news(message: FromEngine) -> bool:
    """Return whether a message has new information; a step in which all sequences waited has none."""
    if not isinstance(message, StepOutputs):
        return True
    news = message.outputs or message.moves or message.residency or message.merge
    return bool(news or message.stats.batch_tokens)


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

"""The engine's loop: it takes messages and makes steps while there is work."""

import logging
import time
from collections.abc import Callable

from server.engine.engine import Engine
from server.engine.faults import EngineBroken
from server.ipc.messages import (
    Emit,
    FromEngine,
    Progress,
    Receive,
    Shutdown,
    StepOutputs,
)

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # how long an idle engine waits for a message at a time
LOADING_SECONDS = 0.002  # the same while all sequences wait for adapters to load
PAUSED_SECONDS = 0.02  # the same in a pause
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
        wait = 0.0 if ran else PAUSED_SECONDS if engine.scheduler.pause.frozen else LOADING_SECONDS


def _has_news(message: FromEngine) -> bool:
    """Return whether a message has new information; a step in which all sequences waited has none."""
    if not isinstance(message, StepOutputs):
        return True
    news = message.outputs or message.moves or message.residency or message.merge
    return bool(news or message.stats.batch_tokens)

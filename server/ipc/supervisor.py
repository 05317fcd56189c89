"""Supervises the engine: starts it, notices when it dies or hangs, and restarts it.

A restart that fails, for whatever reason, is tried again after a while, for ever; only a first start that fails is
final.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Protocol

from server.ipc.messages import EngineInfo, Fatal, FromEngine, Ready, ToEngine

log = logging.getLogger(__name__)

RESTART_BACKOFF_SECONDS = (0.0, 1.0, 5.0, 15.0)  # the last value repeats; the first tokens reset the backoff
START_FACTOR = 10.0  # a restart may take this many times as long as the first start, and longer after each failure
MAX_FAILED_RESTARTS = 4  # in a row; from then on `is_alive` is False, so that the whole server is replaced


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"  # it is not restarted


class EngineUnavailable(Exception):
    """The engine is starting, restarting or dead and cannot take the request."""


class EngineTransport(Protocol):
    """Sends messages to an engine and calls back, on the event loop, with the engine's messages."""

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        """Start an engine. `on_exit(reason)` is called once if the engine ends without `stop`."""

    def send(self, message: ToEngine) -> None: ...

    def kill(self) -> None:
        """Kill a hung engine immediately; `on_exit` follows."""

    async def stop(self) -> None:
        """End the engine, by force if it does not end by itself."""


class Supervised(Protocol):
    """The client that sends work to the engine, as the supervisor sees it."""

    def has_work(self) -> bool:
        """Return True if the engine owes a message, so that silence means that it hangs."""

    def on_message(self, message: FromEngine) -> None:
        """Take a message of the running engine, other than those of its start."""

    def on_ready(self) -> None:
        """Restore what an engine forgets when it ends."""

    def on_down(self, reason: str) -> None:
        """End everything that waits for the engine."""


class EngineSupervisor:
    """Keeps one engine running, and knows its state. All calls must be on one event loop."""

    def __init__(self, transport: EngineTransport, client: Supervised, *, hang_seconds: float):
        self._transport = transport
        self._client = client
        self._hang_seconds = hang_seconds
        self._started: asyncio.Future[None] | None = None
        self._last_progress = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0  # restarts since the engine last computed a token
        self._start_number = 0  # of the current engine process; reports of an earlier one are ignored
        self._start_seconds = 0.0  # that the first start took
        self._ready_by: float | None = None  # when a restarted engine is killed unless it is ready
        self.state = EngineState.STARTING
        self.reason = "the engine is loading the model"
        self.restarts = 0
        self.info: EngineInfo | None = None

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineUnavailable` with the reason if it fails."""
        self._started = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        await self._launch()
        await self._started
        self._start_seconds = time.monotonic() - began
        self.spawn(self._watch_progress())

    async def stop(self) -> None:
        """End the engine and everything that waits for it."""
        self.state, self.reason = EngineState.DEAD, "the server is shutting down"
        for task in self._tasks:
            task.cancel()
        await self._transport.stop()
        self._client.on_down(self.reason)

    def send(self, message: ToEngine) -> None:
        """Send a message to the engine. Raises `EngineUnavailable` unless it is READY."""
        if self.state is not EngineState.READY:
            raise EngineUnavailable(self.reason)
        if not self._client.has_work():
            self._last_progress = time.monotonic()  # progress is measured from here on
        self._transport.send(message)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` until it ends or the supervisor stops."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def is_alive(self) -> bool:
        """Return False if the engine is dead, has work but made no progress for `hang_seconds`, or could not be
        restarted several times in a row (which is still being tried)."""
        if self.state is EngineState.RESTARTING:
            return self._failures <= MAX_FAILED_RESTARTS
        return self.state is not EngineState.DEAD and not self._hangs()

    def computed_tokens(self) -> None:
        """Note that the engine works, which resets the backoff of restarts."""
        self._failures = 0

    def _hangs(self) -> bool:
        return self._client.has_work() and time.monotonic() - self._last_progress > self._hang_seconds

    async def _launch(self) -> None:
        number = self._start_number

        def on_message(message: FromEngine) -> None:
            if number == self._start_number:  # not of an engine that has ended meanwhile
                self._on_message(message)

        await self._transport.start(on_message, lambda reason: self._on_exit(reason, number))

    def _on_message(self, message: FromEngine) -> None:
        self._last_progress = time.monotonic()
        match message:
            case Ready(info=info):
                self._on_ready(info)
            case Fatal(reason=reason):
                self._on_fatal(reason)
            case _:
                self._client.on_message(message)

    def _on_ready(self, info: EngineInfo) -> None:
        self.info = info
        self.state, self.reason = EngineState.READY, "ready"
        self._ready_by = None
        self._client.on_ready()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _on_fatal(self, reason: str) -> None:
        """Mark an engine as dead that cannot start, since another start would fail in the same way. During a restart,
        the cause may pass, because the engine did start before: memory that another process still holds, for
        example."""
        if self.state is EngineState.RESTARTING:
            log.error("the engine could not be restarted: %s", reason)
            self.reason = f"the engine could not be restarted, which is tried again: {reason}"
            return
        self.state, self.reason = EngineState.DEAD, reason
        self._client.on_down(reason)
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineUnavailable(reason))

    def _on_exit(self, reason: str, number: int) -> None:
        if self.state is EngineState.DEAD or number != self._start_number:
            return
        if self.state is EngineState.STARTING:  # a failed first start would fail again
            self._on_fatal(reason)
            return
        self._start_number += 1
        self._ready_by = None
        delay = RESTART_BACKOFF_SECONDS[min(self._failures, len(RESTART_BACKOFF_SECONDS) - 1)]
        log.error("the engine ended (%s) and is restarted in %g s, try %d", reason, delay, self._failures + 1)
        if self.state is EngineState.READY:
            self.state, self.reason = EngineState.RESTARTING, "the engine is restarting"
        self._client.on_down("the engine died and is restarting; try again")
        self.spawn(self._start_again(delay))

    async def _start_again(self, delay: float) -> None:
        await asyncio.sleep(delay)
        self._failures += 1
        self.restarts += 1
        number = self._start_number
        limit = max(self._hang_seconds, START_FACTOR * self._start_seconds) * self._failures
        self._ready_by = time.monotonic() + limit
        try:
            await self._launch()
        except Exception as error:
            log.exception("the engine could not be restarted")
            self._on_exit(f"it could not be started: {error!r}", number)

    async def _watch_progress(self) -> None:
        """Kill an engine that has work but makes no progress, or does not get ready, so that it is restarted."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_seconds / 4))
            if self.state is EngineState.READY and self._hangs():
                log.error("the engine has work but made no progress for %g s; it is restarted", self._hang_seconds)
                self._transport.kill()
            elif self._ready_by is not None and time.monotonic() > self._ready_by:
                log.error("the restarted engine did not get ready in time; it is restarted")
                self._ready_by = None
                self._transport.kill()

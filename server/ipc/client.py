"""The API's client of the engine, over one of two transports.

`ThreadTransport` (engine/thread_transport.py) runs the engine in this process, for tests and debugging.
`ProcessTransport` (ipc/process_transport.py) runs the engine in a child process over a local socket.
The client supervises the engine: if the engine dies or hangs, every running stream gets one error output and the engine
is restarted. A restart that fails, for whatever reason, is tried again after a while, for ever; only a first start that
fails is final.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Protocol

from adapters.tiers import Tier
from server.ipc.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Fatal,
    FromEngine,
    Merge,
    MergeStatus,
    MoveAdapter,
    PinAdapter,
    Progress,
    Ready,
    Reply,
    ResidencyReport,
    RetireAdapter,
    RunSelfTest,
    SelfTest,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToEngine,
    Unmerge,
)
from server.queue_limits import Waiting

log = logging.getLogger(__name__)

RESTART_BACKOFF_SECONDS = (0.0, 1.0, 5.0, 15.0)  # the last value repeats; the first tokens reset the backoff
START_FACTOR = 10.0  # a restart may take this many times as long as the first start, and longer after each failure
MAX_FAILED_RESTARTS = 4  # in a row; from then on `is_alive` is False, so that the whole server is replaced
CALL_SECONDS = 600.0  # for a load, a pin or a self-test
MERGE_SECONDS = 3600.0  # for a merge, which may wait for running requests


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"  # it is not restarted


class EngineUnavailable(Exception):
    """The engine is starting, restarting or dead and cannot take the request."""


class AdapterMoveRefused(Exception):
    """The engine refused a load, unload, pin, self-test or merge; `code` is that of `messages.Reply.error`, or
    "timeout" if the engine did not complete it in time."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class EngineTransport(Protocol):
    """Sends messages to an engine and calls back, on the event loop, with the engine's messages."""

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        """Start an engine. `on_exit(reason)` is called once if the engine ends without `stop`."""

    def send(self, message: ToEngine) -> None: ...

    def kill(self) -> None:
        """Kill a hung engine immediately; `on_exit` follows."""

    async def stop(self) -> None:
        """End the engine, by force if it does not end by itself."""


StepListener = Callable[[StepOutputs], None]


class Stream:
    """The outputs of the sequences of one request, in order; the last output of each has a `finish_reason`.

    Uses a plain list and one future, so that each message of the engine wakes the reader once.
    """

    __slots__ = ("_outputs", "_waiter")

    def __init__(self) -> None:
        self._outputs: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: SequenceOutput) -> None:
        self._outputs.append(output)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[SequenceOutput]:
        """Wait for outputs and return all of them. Only one reader at a time."""
        if not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs


class EngineClient:
    """Submits sequences, moves adapters, and tracks the engine's state. All calls must be on one event loop."""

    def __init__(self, transport: EngineTransport, *, hang_seconds: float = 60.0):
        self._transport = transport
        self._hang_seconds = hang_seconds
        self._streams: dict[str, Stream] = {}
        self._replies: dict[int, asyncio.Future[SelfTest | None]] = {}
        self._pins: set[str] = set()
        self._merge: Merge | None = None  # requested, and not refused or ended
        self._request_ids = itertools.count()
        self.waiting = Waiting()
        self._started: asyncio.Future[None] | None = None
        self._listeners: list[StepListener] = []
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
        self.stats = EngineStats()
        self.residency = ResidencyReport()
        self.merge_status = MergeStatus()

    def add_listener(self, listener: StepListener) -> None:
        """Call `listener` on the event loop with the message of every step; the metrics use this."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineUnavailable` with the reason if it fails."""
        self._started = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        await self._launch()
        await self._started
        self._start_seconds = time.monotonic() - began
        self._spawn(self._watch_progress())

    async def _launch(self) -> None:
        number = self._start_number

        def on_message(message: FromEngine) -> None:
            if number == self._start_number:  # not of an engine that has ended meanwhile
                self._on_message(message)

        await self._transport.start(on_message, lambda reason: self._on_exit(reason, number))

    async def stop(self) -> None:
        """Abort all sequences and end the engine."""
        self.state, self.reason = EngineState.DEAD, "the server is shutting down"
        for task in self._tasks:
            task.cancel()
        await self._transport.stop()
        self._fail_everything(self.reason)

    def submit(self, request: Submit, stream: Stream | None = None) -> Stream:
        """Submit a sequence; its outputs go to `stream` or a new one. Raises `EngineUnavailable` unless READY."""
        self._require_ready()
        self._note_work()
        self._transport.send(request)
        self._streams[request.seq_id] = stream = stream or Stream()
        self.waiting.submitted(request.seq_id, request.cache_salt, request.weight, len(request.token_ids))
        return stream

    def abort(self, seq_ids: list[str]) -> None:
        """Abort sequences; their streams end with reason "abort" within one step."""
        running = [seq_id for seq_id in seq_ids if seq_id in self._streams]
        if running and self.state is EngineState.READY:
            self._transport.send(Abort(running))

    async def move_adapter(self, digest: str, tier: Tier) -> None:
        """Load (`host`, `device`) or unload (`disk`) a version. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        await self._call(MoveAdapter(next(self._request_ids), digest, tier))

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Pin or unpin a version; pins survive a restart. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        if not pinned:
            self._pins.discard(digest)  # a restarted engine must not pin it again
        try:
            await self._call(PinAdapter(next(self._request_ids), digest, pinned))
        except AdapterMoveRefused as refused:
            if pinned and refused.code == "timeout":  # completed later, it would pin what nobody knows to be pinned
                self._tell(PinAdapter(next(self._request_ids), digest, False))
            raise
        if pinned:
            self._pins.add(digest)

    async def run_selftest(self, digest: str, *, verify: bool = True) -> SelfTest:
        """Compare a version with the reference arithmetic; `verify` has the engine check the digest of the stored
        files first. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        result = await self._call(RunSelfTest(next(self._request_ids), digest, verify))
        assert result is not None
        return result

    def retire_adapter(self, digest: str) -> None:
        """Free the memory of a version without names once its last sequence has ended."""
        self._pins.discard(digest)
        if self.requested_merge == digest:
            self._merge = None
        if self.state is EngineState.READY:
            self._transport.send(RetireAdapter(digest))

    @property
    def requested_merge(self) -> str | None:
        """The version of the latest `merge` call, if it is merged or being merged."""
        return None if self._merge is None else self._merge.digest

    async def merge(self, digest: str, *, drain: bool, allow_requantize: bool) -> None:
        """Merge a version into the base model; a merge survives a restart. Raises `AdapterMoveRefused`,
        `EngineUnavailable`."""
        before = self._merge
        self._merge = request = Merge(next(self._request_ids), digest, drain, allow_requantize)
        try:
            await self._call(request, MERGE_SECONDS)
        except (AdapterMoveRefused, EngineUnavailable) as error:
            if self._merge is request:
                self._merge = before
            if isinstance(error, AdapterMoveRefused) and error.code == "timeout":
                self._tell(Unmerge(next(self._request_ids)))
            raise

    async def unmerge(self) -> None:
        """Restore the base model's own weights. Raises `EngineUnavailable`."""
        await self._call(Unmerge(next(self._request_ids)), MERGE_SECONDS)
        self._merge = None

    def is_alive(self) -> bool:
        """Return False if the engine is dead, has work but made no progress for `hang_seconds`, or could not be
        restarted several times in a row (which is still being tried)."""
        if self.state is EngineState.RESTARTING:
            return self._failures <= MAX_FAILED_RESTARTS
        return self.state is not EngineState.DEAD and not self._hangs()

    def _has_work(self) -> bool:
        return bool(self._streams or self._replies)

    def _hangs(self) -> bool:
        return self._has_work() and time.monotonic() - self._last_progress > self._hang_seconds

    def _note_work(self) -> None:
        """Begin to measure progress if the engine had nothing to do until now."""
        if not self._has_work():
            self._last_progress = time.monotonic()

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailable(self.reason)

    def _tell(self, request: PinAdapter | Unmerge) -> None:
        """Send a request whose reply nobody waits for."""
        if self.state is EngineState.READY:
            self._transport.send(request)

    async def _call(
        self, request: MoveAdapter | PinAdapter | RunSelfTest | Merge | Unmerge, seconds: float = CALL_SECONDS
    ) -> SelfTest | None:
        self._require_ready()
        self._note_work()
        self._transport.send(request)
        reply: asyncio.Future[SelfTest | None] = asyncio.get_running_loop().create_future()
        self._replies[request.request_id] = reply
        try:
            async with asyncio.timeout(seconds):
                return await reply
        except TimeoutError:
            raise AdapterMoveRefused("timeout", f"the engine did not complete it within {seconds:g} s") from None
        finally:
            self._replies.pop(request.request_id, None)

    def _on_message(self, message: FromEngine) -> None:
        self._last_progress = time.monotonic()
        match message:
            case StepOutputs():
                self._on_step(message)
            case Reply(request_id=request_id, error=error, selftest=selftest):
                reply = self._replies.pop(request_id, None)
                if reply is not None and not reply.done():
                    if error is None:
                        reply.set_result(selftest)
                    else:
                        reply.set_exception(AdapterMoveRefused(*error))
            case Ready(info=info):
                self._on_ready(info)
            case Progress():
                pass
            case Fatal(reason=reason):
                self._on_fatal(reason)

    def _on_step(self, message: StepOutputs) -> None:
        self.stats = message.stats
        if message.residency is not None:
            self.residency = message.residency
        if message.merge is not None:
            self.merge_status = message.merge
        if any(s.direction == "unmerge" and s.digest == self.requested_merge for s in message.switches):
            self._merge = None  # the engine unmerged it for other requests
        for output in message.outputs:
            self.waiting.left(output.seq_id)
            stream = self._streams.get(output.seq_id)
            if stream is None:
                continue
            stream.put(output)
            if output.finish_reason is not None:
                del self._streams[output.seq_id]
        if self._failures and any(output.token_ids for output in message.outputs):
            self._failures = 0
        for listener in self._listeners:
            listener(message)

    def _on_ready(self, info: EngineInfo) -> None:
        self.info = info
        self.state, self.reason = EngineState.READY, "ready"
        self._ready_by = None
        for digest in self._pins:  # nothing waits for these replies; `residency` shows a pin that no longer fits
            self._transport.send(PinAdapter(next(self._request_ids), digest, True))
        if self._merge is not None:
            self._spawn(self._merge_again(self._merge))
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    async def _merge_again(self, lost: Merge) -> None:
        self._merge = None
        try:
            await self.merge(lost.digest, drain=True, allow_requantize=lost.allow_requantize)
        except AdapterMoveRefused as refused:
            log.warning("the adapter could not be merged again after a restart: %s", refused)
        except EngineUnavailable:  # the next start tries again
            self._merge = lost

    def _on_fatal(self, reason: str) -> None:
        """Mark an engine as dead that cannot start, since another start would fail in the same way. During a restart,
        the cause may pass, because the engine did start before: memory that another process still holds, for
        example."""
        if self.state is EngineState.RESTARTING:
            log.error("the engine could not be restarted: %s", reason)
            self.reason = f"the engine could not be restarted, which is tried again: {reason}"
            return
        self.state, self.reason = EngineState.DEAD, reason
        self._fail_everything(reason)
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
        self.stats, self.residency, self.merge_status = EngineStats(), ResidencyReport(), MergeStatus()
        self._fail_everything("the engine died and is restarting; try again")
        self._spawn(self._start_again(delay))

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

    def _fail_everything(self, reason: str) -> None:
        """End all streams and replies with an error.

        Invariant: every submitted sequence gets exactly one terminal output, even if the engine is gone.
        """
        for seq_id, stream in self._streams.items():
            stream.put(SequenceOutput(seq_id, [], "error", error=reason))
        self._streams.clear()
        self.waiting.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineUnavailable(reason))
        self._replies.clear()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

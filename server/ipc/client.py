"""How the API process talks to the engine: one client over either of two transports.

`ThreadTransport` (engine/loop.py) runs the engine in this process: tests, debugging.
`ProcessTransport` (engine/process.py) runs it in a child over a local socket.
The client supervises: when the engine dies or hangs, every running stream gets one error output and the engine is
started again.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Protocol

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
    Ready,
    Reply,
    Residency,
    RetireAdapter,
    SelfTest,
    SequenceOutput,
    StepOutputs,
    Submit,
    Tier,
    ToEngine,
    TryAdapter,
    Unmerge,
)

log = logging.getLogger(__name__)

RESTART_BACKOFF_SECONDS = (0.0, 1.0, 5.0, 15.0)  # the last one repeats; a start that succeeds begins anew


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"  # it will not come back by itself


class EngineUnavailable(Exception):
    """The engine is not there to take the request; try again later."""


class AdapterMoveRefused(Exception):
    """A load, unload, pin or merge that the engine could not do; `code` is that of `messages.Reply.error`."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class EngineTransport(Protocol):
    """Carries messages to an engine and calls back, on the event loop, with what comes from it."""

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        """Start an engine; `on_exit(reason)` says, once, that it ended without `stop`."""

    def send(self, message: ToEngine) -> None: ...

    def kill(self) -> None:
        """End an engine that hangs, at once; `on_exit` follows."""

    async def stop(self) -> None:
        """End the engine, by force when it does not go by itself."""


StepListener = Callable[[StepOutputs], None]


class Stream:
    """Outputs of the sequences of one request, in order; the last of each has a `finish_reason`.

    A plain list and one future: however much an engine's message brings, the reader is woken once.
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
        """All there is, once there is something. One reader at a time."""
        if not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs


class EngineClient:
    """Submits sequences, moves adapters, and knows whether the engine is there. All calls on one event loop."""

    def __init__(self, transport: EngineTransport, *, hang_seconds: float = 60.0):
        self._transport = transport
        self._hang_seconds = hang_seconds
        self._streams: dict[str, Stream] = {}
        self._replies: dict[int, asyncio.Future[SelfTest | None]] = {}
        self._pins: set[str] = set()
        self._merge: Merge | None = None  # asked for and not refused or ended
        self._request_ids = itertools.count()
        self._started: asyncio.Future[None] | None = None
        self._listeners: list[StepListener] = []
        self._last_progress = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0
        self.state = EngineState.STARTING
        self.reason = "the engine is loading the model"
        self.restarts = 0
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.residency = Residency()
        self.merge_status = MergeStatus()

    def add_listener(self, listener: StepListener) -> None:
        """Have `listener` called, on the event loop, with every message of a step (metrics hang here)."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineUnavailable` with the reason if it cannot."""
        self._started = asyncio.get_running_loop().create_future()
        await self._transport.start(self._on_message, self._on_exit)
        await self._started
        self._spawn(self._watch_progress())

    async def stop(self) -> None:
        """Abort what runs and end the engine."""
        self.state, self.reason = EngineState.DEAD, "the server is shutting down"
        for task in self._tasks:
            task.cancel()
        await self._transport.stop()
        self._fail_everything(self.reason)

    def submit(self, request: Submit, stream: Stream | None = None) -> Stream:
        """Queue a sequence, with its outputs in `stream` or a new one. Raises `EngineUnavailable` unless READY."""
        self._require_ready()
        if not self._streams:
            self._last_progress = time.monotonic()
        self._streams[request.seq_id] = stream = stream or Stream()
        self._transport.send(request)
        return stream

    def abort(self, seq_ids: list[str]) -> None:
        """Drop sequences; their streams end with reason "abort" within one step."""
        running = [seq_id for seq_id in seq_ids if seq_id in self._streams]
        if running and self.state is EngineState.READY:
            self._transport.send(Abort(running))

    async def move_adapter(self, digest: str, tier: Tier) -> None:
        """Load (`host`, `device`) or unload (`disk`) a version. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        await self._call(MoveAdapter(next(self._request_ids), digest, tier))

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Pin or unpin a version; pins outlive a restart. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        if not pinned:
            self._pins.discard(digest)  # an engine that is away must not pin it again
        await self._call(PinAdapter(next(self._request_ids), digest, pinned))
        if pinned:
            self._pins.add(digest)

    async def try_adapter(self, digest: str) -> SelfTest:
        """Compare a stored version with the reference arithmetic. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        result = await self._call(TryAdapter(next(self._request_ids), digest))
        assert result is not None
        return result

    def retire_adapter(self, digest: str) -> None:
        """No name points at the version any more; its memory goes when its last sequence has ended."""
        self._pins.discard(digest)
        if self.asked_to_merge == digest:
            self._merge = None
        if self.state is EngineState.READY:
            self._transport.send(RetireAdapter(digest))

    @property
    def asked_to_merge(self) -> str | None:
        """The version that `merge` was asked for and that is merged, or about to be."""
        return None if self._merge is None else self._merge.digest

    async def merge(self, digest: str, *, drain: bool, allow_requantize: bool) -> None:
        """Fold a version into the base's weights; a merge outlives a restart. Raises `AdapterMoveRefused`,
        `EngineUnavailable`."""
        before = self._merge
        self._merge = asked = Merge(next(self._request_ids), digest, drain, allow_requantize)
        try:
            await self._call(asked)
        except (AdapterMoveRefused, EngineUnavailable):
            if self._merge is asked:
                self._merge = before
            raise

    async def unmerge(self) -> None:
        """Put the base's own weights back. Raises `EngineUnavailable`."""
        await self._call(Unmerge(next(self._request_ids)))
        self._merge = None

    def is_alive(self) -> bool:
        """False when the engine is dead, or has work and made no step for the hang threshold."""
        return self.state is not EngineState.DEAD and not self._hangs()

    def _hangs(self) -> bool:
        return bool(self._streams) and time.monotonic() - self._last_progress > self._hang_seconds

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise EngineUnavailable(self.reason)

    async def _call(self, request: MoveAdapter | PinAdapter | TryAdapter | Merge | Unmerge) -> SelfTest | None:
        self._require_ready()
        reply: asyncio.Future[SelfTest | None] = asyncio.get_running_loop().create_future()
        self._replies[request.request_id] = reply
        self._transport.send(request)
        return await reply

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
            case Fatal(reason=reason):
                self._on_fatal(reason)

    def _on_step(self, message: StepOutputs) -> None:
        self.stats = message.stats
        if message.residency is not None:
            self.residency = message.residency
        if message.merge is not None:
            self.merge_status = message.merge
        if any(s.direction == "unmerge" and s.digest == self.asked_to_merge for s in message.switches):
            self._merge = None  # it gave way
        for output in message.outputs:
            stream = self._streams.get(output.seq_id)
            if stream is None:
                continue
            stream.put(output)
            if output.finish_reason is not None:
                del self._streams[output.seq_id]
        for listener in self._listeners:
            listener(message)

    def _on_ready(self, info: EngineInfo) -> None:
        self.info = info
        self.state, self.reason = EngineState.READY, "ready"
        self._failures = 0
        for digest in self._pins:  # nobody waits for these replies: a pin that no longer fits shows in residency
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
            log.warning("the adapter stays unmerged: %s", refused)
        except EngineUnavailable:  # the next one may be luckier
            self._merge = lost

    def _on_fatal(self, reason: str) -> None:
        """The engine says why it cannot start: starting it again would fail in the same way."""
        self.state, self.reason = EngineState.DEAD, reason
        self._fail_everything(reason)
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineUnavailable(reason))

    def _on_exit(self, reason: str) -> None:
        if self.state is EngineState.DEAD:
            return
        if self.state is EngineState.STARTING:  # a first start that fails would fail again
            self._on_fatal(reason)
            return
        log.error("engine lost: %s", reason)
        self.state, self.reason = EngineState.RESTARTING, "the engine is restarting"
        self.stats, self.residency, self.merge_status = EngineStats(), Residency(), MergeStatus()
        self._fail_everything("the engine died and is restarting; try again")
        self._spawn(self._start_again())

    async def _start_again(self) -> None:
        await asyncio.sleep(RESTART_BACKOFF_SECONDS[min(self._failures, len(RESTART_BACKOFF_SECONDS) - 1)])
        self._failures += 1
        self.restarts += 1
        await self._transport.start(self._on_message, self._on_exit)

    async def _watch_progress(self) -> None:
        """Replace an engine that has work but stopped stepping."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_seconds / 4))
            if self.state is EngineState.READY and self._hangs():
                log.error("no step for %g s with work to do", self._hang_seconds)
                self._transport.kill()

    def _fail_everything(self, reason: str) -> None:
        """Invariant: every submitted sequence ends in exactly one terminal output, even when the engine is gone."""
        for seq_id, stream in self._streams.items():
            stream.put(SequenceOutput(seq_id, [], "error", error=reason))
        self._streams.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineUnavailable(reason))
        self._replies.clear()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

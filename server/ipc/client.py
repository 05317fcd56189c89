"""The API's client of the engine, over one of two transports.

`ThreadTransport` (engine/thread_transport.py) runs the engine in this process, for tests and debugging.
`ProcessTransport` (ipc/process_transport.py) runs the engine in a child process over a local socket.
If the engine dies or hangs, every running stream gets one error output, and the supervisor restarts the engine.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable

from adapters.tiers import Tier
from server.ipc.messages import (
    Abort,
    Call,
    EngineInfo,
    EngineStats,
    FromEngine,
    Merge,
    MergeStatus,
    MoveAdapter,
    Pause,
    PauseMode,
    PinAdapter,
    Reply,
    ResetPrefixCache,
    ResidencyReport,
    Resume,
    RetireAdapter,
    RunSelfTest,
    SelfTest,
    SequenceOutput,
    StepOutputs,
    Submit,
    SwitchAdapter,
    Unmerge,
)
from server.ipc.stream import Stream
from server.ipc.supervisor import EngineState, EngineSupervisor, EngineTransport, EngineUnavailable
from server.queue_limits import Waiting

log = logging.getLogger(__name__)

CALL_SECONDS = 600.0  # for a load, a pin or a self-test
MERGE_SECONDS = 3600.0  # for a merge, which may wait for running requests

StepListener = Callable[[StepOutputs], None]


class AdapterMoveRefused(Exception):
    """The engine refused a load, unload, pin, self-test or merge; `code` is that of `messages.Reply.error`, or
    "timeout" if the engine did not complete it in time."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class EngineClient:
    """Submits sequences, moves adapters, and holds the engine's last reports. All calls must be on one event loop."""

    def __init__(self, transport: EngineTransport, *, hang_seconds: float = 60.0):
        self._supervisor = EngineSupervisor(transport, self, hang_seconds=hang_seconds)
        self._streams: dict[str, Stream] = {}
        self._replies: dict[int, asyncio.Future[SelfTest | None]] = {}
        self._pins: set[str] = set()
        self._merge: Merge | None = None  # requested, and not refused or ended
        self._request_ids = itertools.count()
        self._listeners: list[StepListener] = []
        self.is_paused = False
        self.waiting = Waiting()
        self.stats = EngineStats()
        self.residency = ResidencyReport()
        self.merge_status = MergeStatus()

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def reason(self) -> str:
        """Why the engine is in its state, as a sentence for clients."""
        return self._supervisor.reason

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def info(self) -> EngineInfo | None:
        """The facts of the engine, known once it has been ready."""
        return self._supervisor.info

    def is_alive(self) -> bool:
        """Return False if the engine is dead, hangs, or could not be restarted several times in a row."""
        return self._supervisor.is_alive()

    def add_listener(self, listener: StepListener) -> None:
        """Call `listener` on the event loop with the message of every step; the metrics use this."""
        self._listeners.append(listener)

    def remove_listener(self, listener: StepListener) -> None:
        self._listeners.remove(listener)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineUnavailable` with the reason if it fails."""
        await self._supervisor.start()

    async def stop(self) -> None:
        """Abort all sequences and end the engine."""
        await self._supervisor.stop()

    def submit(self, request: Submit, stream: Stream | None = None) -> Stream:
        """Submit a sequence; its outputs go to `stream` or a new one. Raises `EngineUnavailable` unless READY."""
        self._supervisor.send(request)
        self._streams[request.seq_id] = stream = stream or Stream()
        self.waiting.submitted(request.seq_id, request.cache_salt, request.weight, len(request.token_ids))
        return stream

    def abort(self, seq_ids: list[str]) -> None:
        """Abort sequences; their streams end with reason "abort" within one step."""
        running = [seq_id for seq_id in seq_ids if seq_id in self._streams]
        if running:
            self._tell(Abort(running))

    def stop_sequences(self, seq_ids: list[str]) -> None:
        """End sequences; what they have generated is their output, with reason "stopped"."""
        running = [seq_id for seq_id in seq_ids if seq_id in self._streams]
        if running:
            self._tell(Abort(running, keep_output=True))

    async def switch_adapter(self, seq_ids: list[str], old: str, new: str) -> None:
        """Continue sequences with another version, whose tokens so far are recomputed. Raises `AdapterMoveRefused`,
        `EngineUnavailable`."""
        await self._call(SwitchAdapter(next(self._request_ids), seq_ids, old, new))

    async def pause(self, mode: PauseMode) -> None:
        """Run no steps until `resume`; returns when paused. A pause survives a restart. Raises `AdapterMoveRefused`,
        `EngineUnavailable`."""
        self.is_paused = True
        await self._call(Pause(next(self._request_ids), mode), MERGE_SECONDS)

    async def resume(self) -> None:
        """End a pause. Raises `EngineUnavailable`."""
        self.is_paused = False
        await self._call(Resume(next(self._request_ids)))

    async def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Raises `EngineUnavailable`."""
        await self._call(ResetPrefixCache(next(self._request_ids)))

    async def move_adapter(self, digest: str, tier: Tier) -> None:
        """Load (`host`, `device`) or unload (`disk`) a version. Raises `AdapterMoveRefused`, `EngineUnavailable`."""
        await self._call(MoveAdapter(next(self._request_ids), digest, tier))

    def load_soon(self, digest: str) -> None:
        """Load a small version to the device, if it has room, ahead of its first request."""
        self._tell(MoveAdapter(next(self._request_ids), digest, "device", urgent=True))

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
        self._tell(RetireAdapter(digest))

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

    def _tell(self, message: Abort | MoveAdapter | PinAdapter | RetireAdapter | Pause | Unmerge) -> None:
        """Send a message that nobody waits for a reply to, and that means nothing to an engine that is not ready."""
        if self.state is EngineState.READY:
            self._supervisor.send(message)

    async def _call(self, request: Call, seconds: float = CALL_SECONDS) -> SelfTest | None:
        self._supervisor.send(request)
        reply: asyncio.Future[SelfTest | None] = asyncio.get_running_loop().create_future()
        self._replies[request.request_id] = reply
        try:
            async with asyncio.timeout(seconds):
                return await reply
        except TimeoutError:
            raise AdapterMoveRefused("timeout", f"the engine did not complete it within {seconds:g} s") from None
        finally:
            self._replies.pop(request.request_id, None)

    # -- called by the supervisor --------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Return True if a stream or a call waits for the engine."""
        return bool(self._streams or self._replies)

    def on_message(self, message: FromEngine) -> None:
        """Pass outputs to their streams and replies to their calls."""
        match message:
            case StepOutputs():
                self._on_step(message)
            case Reply():
                self._on_reply(message)

    def on_ready(self) -> None:
        """Pin and merge again what was pinned and merged before a restart, and pause again."""
        if self.is_paused:
            self._tell(Pause(next(self._request_ids), "keep"))
        for digest in self._pins:  # nothing waits for these replies; `residency` shows a pin that no longer fits
            self._tell(PinAdapter(next(self._request_ids), digest, True))
        if self._merge is not None:
            self._supervisor.spawn(self._merge_again(self._merge))

    def on_down(self, reason: str) -> None:
        """End all streams and replies with an error.

        Invariant: every submitted sequence gets exactly one terminal output, even if the engine is gone.
        """
        self.stats, self.residency, self.merge_status = EngineStats(), ResidencyReport(), MergeStatus()
        for seq_id, stream in self._streams.items():
            stream.put(SequenceOutput(seq_id, [], "error", error=reason))
        self._streams.clear()
        self.waiting.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineUnavailable(reason))
        self._replies.clear()

    def _on_reply(self, message: Reply) -> None:
        reply = self._replies.pop(message.request_id, None)
        if reply is None or reply.done():
            return
        if message.error is None:
            reply.set_result(message.selftest)
        else:
            reply.set_exception(AdapterMoveRefused(*message.error))

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
        if any(output.token_ids for output in message.outputs):
            self._supervisor.computed_tokens()
        for listener in [*self._listeners]:
            listener(message)

    async def _merge_again(self, lost: Merge) -> None:
        self._merge = None
        try:
            await self.merge(lost.digest, drain=True, allow_requantize=lost.allow_requantize)
        except AdapterMoveRefused as refused:
            log.warning("the adapter could not be merged again after a restart: %s", refused)
        except EngineUnavailable:  # the next start tries again
            self._merge = lost

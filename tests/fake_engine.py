"""An engine without a model: it says the tokens it was told to say, one per step, and moves adapters in no time."""

import asyncio
import math
from collections.abc import Callable
from typing import Literal

from server.ipc.messages import (
    Abort,
    AdapterMove,
    EngineInfo,
    EngineStats,
    FromEngine,
    Merge,
    MergeStatus,
    MergeSwitch,
    MoveAdapter,
    PinAdapter,
    Ready,
    Reply,
    Residency,
    RetireAdapter,
    RunSelfTest,
    SelfTest,
    SequenceOutput,
    StepOutputs,
    Submit,
    Tier,
    ToEngine,
    Unmerge,
)
from server.sequence import TokenLogprobs

Refusal = tuple[Literal["busy", "invalid", "not_found", "no_room"], str]


class FakeTransport:
    """`script` gives the tokens of a sequence; the last, if it is an end token, ends it. `slow` is one step's time.

    A sequence that has said `waits_after` tokens says no more until the test changes that; while all wait, no step is
    made.
    """

    def __init__(self, info: EngineInfo, script: Callable[[Submit], list[int]]):
        self.info = info
        self.script = script
        self.slow = 0.0
        self.waits_after: Callable[[Submit], float] = lambda _: math.inf
        self.fail_after: int | None = None  # tokens after which a sequence fails, with `failure` for the client
        self.failure: str | None = None
        self.comes_back = True  # after it died
        self.refuse: dict[str, Refusal] = {}  # digest to the error of its moves
        self.selftest_error: Refusal | None = None
        self.selftest = SelfTest(2e-6, 1e-6, 1e-3)
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.device: set[str] = set()
        self.pinned: set[str] = set()
        self.merges: list[Merge] = []
        self.merged: str | None = None
        self._running: dict[str, tuple[Submit, list[int]]] = {}
        self._wake = asyncio.Event()

    async def start(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[str], None]) -> None:
        self._emit, self._exit = on_message, on_exit
        self._task = asyncio.create_task(self._run())
        if self.comes_back:
            on_message(Ready(self.info))

    def kill(self) -> None:
        self.die()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def die(self) -> None:
        self._running.clear()
        self._task.cancel()
        self._exit("killed by a test")

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self.submitted.append(message)
                self._running[message.seq_id] = (message, list(self.script(message)))
            case Abort(seq_ids=seq_ids):
                self.aborted += seq_ids
                ended = [SequenceOutput(i, [], "abort") for i in seq_ids if self._running.pop(i, None)]
                asyncio.get_running_loop().call_soon(self._emit, StepOutputs(ended, self._stats()))
            case MoveAdapter() | PinAdapter():
                asyncio.get_running_loop().call_soon(self._move, message)
            case RunSelfTest(request_id=request_id):
                reply = Reply(request_id, self.selftest_error, None if self.selftest_error else self.selftest)
                asyncio.get_running_loop().call_soon(self._emit, reply)
            case RetireAdapter(digest=digest):
                self.pinned.discard(digest)
                self.device.discard(digest)
            case Merge() | Unmerge():
                asyncio.get_running_loop().call_soon(self._merge, message)
        self._wake.set()

    def _merge(self, message: Merge | Unmerge) -> None:
        """A merge that is refused says so; any other is there at once."""
        error, switches, status = None, [], MergeStatus()
        if isinstance(message, Merge):
            self.merges.append(message)
            error = self.refuse.get(message.digest)
        if isinstance(message, Merge) and error is None:
            self.merged, status = message.digest, MergeStatus("merged", message.digest, "request")
            switches = [MergeSwitch(message.digest, "merge", "request")]
        elif isinstance(message, Unmerge) and self.merged is not None:
            switches, self.merged = [MergeSwitch(self.merged, "unmerge", "request")], None
        self._emit(StepOutputs([], self._stats(), merge=status, switches=switches))
        self._emit(Reply(message.request_id, error))

    def _move(self, message: MoveAdapter | PinAdapter) -> None:
        error, up = self.refuse.get(message.digest), getattr(message, "tier", "device") != "disk"
        if error is None:
            (self.device.add if up else self.device.discard)(message.digest)
            if isinstance(message, PinAdapter):
                (self.pinned.add if message.pinned else self.pinned.discard)(message.digest)
        ends: tuple[Tier, Tier] = ("disk", "device") if up else ("device", "disk")
        move = AdapterMove(message.digest, *ends, "ok" if error is None else "failed", 0.01)
        residency = Residency(device=sorted(self.device), pinned=dict.fromkeys(sorted(self.pinned), 1))
        self._emit(StepOutputs([], self._stats(), [move], residency))
        self._emit(Reply(message.request_id, error))

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self.slow)
            going = [running for running in self._running.values() if not self._waits(*running)]
            if self._running and not going:
                await asyncio.sleep(0.001)
                continue
            outputs = [self._advance(*running) for running in going]
            if not self._running:
                self._wake.clear()
            self._emit(StepOutputs(outputs, self._stats(batch_tokens=len(outputs))))

    def _waits(self, submit: Submit, left: list[int]) -> bool:
        return self._said(submit, left) >= self.waits_after(submit)

    def _said(self, submit: Submit, left: list[int]) -> int:
        return len(self.script(submit)) - len(left)

    def _advance(self, submit: Submit, left: list[int]) -> SequenceOutput:
        sampling, token = submit.sampling, left.pop(0)
        said = self._said(submit, left)
        if self.fail_after is not None and said > self.fail_after:
            return self._end(submit, SequenceOutput(submit.seq_id, [], "error", error=self.failure))
        score = TokenLogprobs(-0.5, 1, [(token, -0.5), (65, -1.5), (66, float("-inf"))][: (sampling.logprobs or 0)])
        ends = (*self.info.eos_token_ids, *sampling.stop_token_ids)
        limit: Literal["length"] | None = "length" if said == sampling.max_tokens else None
        reason: Literal["stop", "length"] | None = "stop" if token in ends else limit
        scores = None if sampling.logprobs is None else [score]
        output = SequenceOutput(submit.seq_id, [token], reason, scores, num_cached_tokens=4, queue_seconds=0.001)
        return self._end(submit, output) if reason else output

    def _end(self, submit: Submit, output: SequenceOutput) -> SequenceOutput:
        del self._running[submit.seq_id]
        return output

    def _stats(self, batch_tokens: int = 0) -> EngineStats:
        adapters = sorted({adapter.digest for submit, _ in self._running.values() for adapter in submit.adapters})
        return EngineStats(
            steps=1,
            running=len(self._running),
            blocks_used=len(self._running),
            blocks_total=100,
            prefix_queries=10,
            prefix_hits=4,
            graph_steps=7,
            eager_steps={"prefill": 3},
            slots_used=len(self.device),
            slots_pinned=len(self.pinned),
            slots_total=self.info.adapter_slots,
            step_seconds=0.01,
            batch_tokens=batch_tokens,
            batch_adapters=len(adapters),
            running_adapters=adapters,
        )

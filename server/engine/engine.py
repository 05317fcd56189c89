"""The engine: token ids in, token ids out, one step at a time. Knows no HTTP and no text; owns no thread."""

import logging
import time
from collections import deque

from adapters.kernels.segments import column_runs
from adapters.residency.residency import Residency
from adapters.residency.slots import PAGE_COLUMNS
from adapters.runtime.pack import PackedAdapter
from server.engine.adapter_requests import AdapterMoves
from server.engine.merging import Merging
from server.engine.pipeline import PLACEHOLDER, InFlightStep, failed_step
from server.engine.scheduler import Scheduler
from server.engine.selftest import SelfTests
from server.engine.stats import describe, digests_of, measure
from server.ipc.messages import (
    Abort,
    AdapterMove,
    FromEngine,
    Merge,
    MoveAdapter,
    PinAdapter,
    Reply,
    RetireAdapter,
    RunSelfTest,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToEngine,
    Unmerge,
)
from server.model.batch import ForwardBatch, LateTokens, build_batch
from server.model.runner import ModelRunner
from server.model.sampling.sampler import Sample, looks_back, start_sampling
from server.sequence import FinishReason, ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus

log = logging.getLogger(__name__)


class Engine:
    """`handle` takes in one message, `step` runs one forward pass over what is scheduled.

    With `overlap`, a step is launched before the tokens of the previous one are collected, so that the device never
    waits for the host. The output of a sequence is the same either way; a sequence that stops is computed once more,
    for nothing.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        residency: Residency[PackedAdapter],
        selftests: SelfTests,
        merging: Merging,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        *,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.residency = residency
        self.merging = merging
        self.overlap = overlap
        self._runner = runner
        self._selftests = selftests
        self._moves = AdapterMoves(residency)
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[InFlightStep] = deque()
        self._outputs: list[SequenceOutput] = []
        self._steps = 0

    def has_work(self) -> bool:
        waiting = self._sequences or self._in_flight or self._moves or self._selftests or self._outputs
        return bool(waiting) or self.residency.changed or self.merging.has_work()

    def close(self) -> None:
        """End the threads that read adapters."""
        self._selftests.close()
        self.residency.close()

    def handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(seq_ids=seq_ids):
                for seq_id in seq_ids:
                    if seq_id in self._sequences:
                        self._finish(self._sequences[seq_id], [], FinishReason.ABORT)
            case MoveAdapter() | PinAdapter():
                self._moves.add(message)
            case RunSelfTest():
                self._selftests.add(message)
            case RetireAdapter(digest=digest):
                self._moves.retire(digest)
                self.merging.leave("retired", digest)
            case Merge():
                self.residency.expect(message.digest)
                self.merging.merge(message)
            case Unmerge(request_id=request_id):
                self.merging.unmerge(request_id)

    def step(self) -> list[FromEngine]:
        """Run one forward pass over all schedulable sequences; return messages, outputs first."""
        started = time.perf_counter()
        depth = 1 if self.overlap else 0  # steps that may be in flight when this returns
        self._collect_down_to(0 if self._needs_tokens() else depth)
        replies = self._between_steps()
        batch = self.scheduler.schedule()
        if batch:
            step = self._launch(batch)
            self._in_flight.append(step)
            self._collect_down_to(1)
            if step.failed:
                depth = 0
            else:
                self._advance(step)
        self._collect_down_to(depth if batch else 0)
        return [self._report(batch, time.perf_counter() - started), *replies]

    def _between_steps(self) -> list[Reply]:
        """Let loads, self-tests and merges go on; return the replies that are due."""
        self.residency.poll()
        self.merging.advance()
        replies = [*self._moves.poll(), *self._selftests.advance(), *self.merging.take_replies()]
        self._cancel_reads()
        if self._moves:
            self._moves.unload_retired(digests_of(self._sequences.values()))
        for seq, reason in self.scheduler.failed():
            self._finish(seq, [], FinishReason.ERROR, error=f"the adapter could not be loaded: {reason}")
        return replies

    # -- sequences -----------------------------------------------------------------------------------------------

    def _submit(self, request: Submit) -> None:
        seq = Sequence(
            request.seq_id,
            [*request.token_ids],
            request.sampling,
            request.adapters,
            request.cache_salt,
            time.monotonic(),
            request.active_from,
            request.priority,
            request.weight,
        )
        self._sequences[seq.seq_id] = seq
        for adapter in seq.adapters:
            self._moves.unretire(adapter.digest)
            self.residency.expect(adapter.digest)
        self.merging.arrived(seq.sole_adapter)
        self.scheduler.add(seq)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _launch(self, batch: ScheduledBatch) -> InFlightStep:
        """Queue one forward pass on the device. If that fails, collecting the step raises the error, which ends the
        sequences of this batch and nothing else."""
        self._steps += 1
        now = time.monotonic()
        for scheduled in batch.sequences:
            if scheduled.seq.admitted is None:
                scheduled.seq.admitted = now
                scheduled.seq.num_cached_tokens = scheduled.start
        try:
            return self._forward(batch)
        except Exception as error:
            return failed_step(batch, error)

    def _forward(self, batch: ScheduledBatch) -> InFlightStep:
        sampled = [scheduled.seq for scheduled in batch.sequences if scheduled.samples]
        self._runner.kv_cache.scrub(self.scheduler.take_suspect_blocks())
        previous = self._in_flight[-1] if self._in_flight else None
        late = None if previous is None else (previous.placeholders, previous.tokens)
        forward = self._forward_batch(batch, late)
        for scheduled in batch.sequences:
            scheduled.seq.num_launched_tokens = scheduled.end
        logits = self._runner.run(forward)
        vocab_sizes = [self._runner.vocab_size(seq.slots) for seq in sampled]
        started = start_sampling(logits, sampled, self._eos_token_ids, vocab_sizes)
        return InFlightStep(batch, started.tokens, started.collect)

    def _advance(self, step: InFlightStep) -> None:
        """Bring the step's sequences to where they are after it, whatever its tokens turn out to be. A sequence that
        the next token will surely end has nothing left to compute."""
        place = 0
        for scheduled in step.batch.sequences:
            seq = scheduled.seq
            if self._is_live(seq):
                self.scheduler.blocks.commit(seq, scheduled.end)
                if scheduled.samples and not self._is_full(seq, scheduled.end + 1):
                    seq.token_ids.append(PLACEHOLDER)
                    step.placeholders[seq] = place
            place += scheduled.samples

    def _needs_tokens(self) -> bool:
        """Return whether the next step cannot be put together without the tokens of those in flight."""
        scheduled = (scheduled for step in self._in_flight for scheduled in step.batch.sequences)
        live = (found.seq for found in scheduled if self._is_live(found.seq))
        return self.merging.has_work() or any(looks_back(seq.sampling) for seq in live)

    def _collect_down_to(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._collect(self._in_flight.popleft())

    def _collect(self, step: InFlightStep) -> None:
        """Wait for the step's tokens, and give them to the sequences that have not ended meanwhile."""
        try:
            samples = iter(step.collect())
        except Exception as error:  # of the launch, or of the device, which reports an error only now
            self._abandon_all(step.batch, error)
            return
        for scheduled in step.batch.sequences:
            sampled = next(samples) if scheduled.samples else None
            if sampled is not None and self._is_live(scheduled.seq):
                self._take(scheduled, sampled)

    def _take(self, scheduled: ScheduledSequence, sampled: Sample) -> None:
        seq, end = scheduled.seq, scheduled.end
        if sampled.token_id < 0:
            self._abandon(seq, "the model produced numbers that are not finite")
            return
        if seq.num_computed_tokens >= end:  # not if it was preempted meanwhile: those blocks are no longer its own
            seq.num_verified_tokens = end
        seq.token_ids[end:] = [sampled.token_id]
        self._finish(seq, [sampled.token_id], self._finish_reason(seq, sampled.token_id), sampled=sampled)

    def _is_live(self, seq: Sequence) -> bool:
        """Return whether the sequence has not ended while a step with it was in flight."""
        return self._sequences.get(seq.seq_id) is seq

    def _is_full(self, seq: Sequence, num_tokens: int) -> bool:
        return num_tokens - seq.num_prompt_tokens >= seq.sampling.max_tokens or num_tokens >= self._max_model_len

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.sampling
        stops = token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)
        if stops and seq.num_output_tokens >= params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(seq, seq.num_tokens) else None

    def _finish(
        self,
        seq: Sequence,
        token_ids: list[int],
        reason: FinishReason | None,
        sampled: Sample | None = None,
        error: str | None = None,
    ) -> None:
        """Report what happened to `seq`; with a reason, remove it as well."""
        self._outputs.append(
            SequenceOutput(
                seq.seq_id,
                token_ids,
                None if reason is None else reason.value,
                [sampled.logprobs] if sampled is not None and sampled.logprobs is not None else None,
                seq.num_cached_tokens,
                (seq.admitted or time.monotonic()) - seq.arrival,
                error,
            )
        )
        if reason is not None:
            self.scheduler.finish(seq)
            del self._sequences[seq.seq_id]

    def _abandon(self, seq: Sequence, error: str) -> None:
        """End a sequence whose numbers went bad; nothing of what it computed can be trusted."""
        seq.num_verified_tokens = -1
        self._finish(seq, [], FinishReason.ERROR, error=error)

    def _abandon_all(self, batch: ScheduledBatch, failure: Exception) -> None:
        log.error("a step failed; its %d sequences end with an error", len(batch.sequences), exc_info=failure)
        for scheduled in batch.sequences:
            if self._is_live(scheduled.seq):
                self._abandon(scheduled.seq, "the engine failed to compute this step")

    # -- adapters ------------------------------------------------------------------------------------------------

    def _forward_batch(self, batch: ScheduledBatch, late_tokens: LateTokens | None = None) -> ForwardBatch:
        sequences = [scheduled.seq for scheduled in batch.sequences if scheduled.seq.slots]
        slots = [self.residency.slots.get(digest) for digest in digests_of(sequences)]
        columns = {slot.index: column_runs(slot.pages, PAGE_COLUMNS) for slot in slots if slot}
        return build_batch(batch, self.scheduler.blocks.block_size, self._runner.device, columns, late_tokens)

    def _cancel_reads(self) -> None:
        if self.residency.is_reading():
            in_use = digests_of(self._sequences.values())
            self.residency.cancel_reads(in_use | self._moves.digests() | self._selftests.digests())

    # -- report --------------------------------------------------------------------------------------------------

    def _report(self, batch: ScheduledBatch, seconds: float) -> StepOutputs:
        outputs, self._outputs = self._outputs, []
        moves = [
            AdapterMove(m.digest, m.source, m.target, m.outcome, m.seconds, m.error)
            for m in self.residency.take_moves()
        ]
        residency = describe(self.residency) if self.residency.changed else None
        merge = self.merging.status if self.merging.changed else None
        self.residency.changed = self.merging.changed = False
        stats = measure(self.scheduler, self.residency, self._runner.graphs, batch, self._steps, seconds)
        return StepOutputs(outputs, stats, moves, residency, merge, self.merging.take_switches())

    def check_integrity(self) -> None:
        """Raise AssertionError when any of the books do not balance; tests call this between steps."""
        running = self.scheduler.running
        self.scheduler.blocks.check_integrity(running)
        references: dict[str, int] = {}
        for seq in running:
            assert seq.status is SequenceStatus.RUNNING
            if not seq.slots:
                assert not seq.adapters or self.scheduler.gate.in_base(seq)
                continue
            for adapter in seq.adapters:
                references[adapter.digest] = references.get(adapter.digest, 0) + 1
        self.residency.check_integrity(references, self._runner.pool.extra_bytes())
        assert {seq.seq_id for seq in [*running, *self.scheduler.waiting]} == set(self._sequences)

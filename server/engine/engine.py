"""The engine: token ids in, token ids out, one step at a time. Knows no HTTP and no text; owns no thread."""

import logging
import time
from collections import deque

from torch import nn

from adapters.fault_points import fault_point
from adapters.kernels.segments import column_runs
from adapters.residency.residency import Residency
from adapters.residency.slots import PAGE_COLUMNS
from adapters.runtime.pack import PackedAdapter
from server.engine.adapter_requests import AdapterMoves
from server.engine.constraints import Constraints, Parser
from server.engine.faults import EngineBroken, failure_reply, input_problem
from server.engine.grammars import ConstraintFailed
from server.engine.integrity import check_integrity
from server.engine.isolation import Isolation
from server.engine.merging import Merging
from server.engine.pipeline import PLACEHOLDER, InFlightStep, failed_step
from server.engine.progress import StepProgress
from server.engine.scheduler import Scheduler
from server.engine.selftest import SelfTests
from server.engine.sequence_messages import output_of, sequence_of
from server.engine.stats import describe, digests_of, measure
from server.ipc.messages import (
    Abort,
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
from server.model.pooling import has_finite_pool, start_collecting
from server.model.runner import ModelRunner
from server.model.sampling.prompt_logprobs import is_finite, start_scoring_prompts
from server.model.sampling.sampler import Sample, Started, start_sampling
from server.model.sampling.token_counts import TokenCounts
from server.sequence import FinishReason, ScheduledBatch, ScheduledSequence, Sequence

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
        constraints: Constraints,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        *,
        overlap: bool = False,
        progress: StepProgress | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.residency = residency
        self.merging = merging
        self.overlap = overlap
        self.progress = progress or StepProgress(nn.Identity())
        self._runner = runner
        self._selftests = selftests
        self._constraints = constraints
        self._moves = AdapterMoves(residency)
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._token_counts = TokenCounts(runner.device)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[InFlightStep] = deque()
        self._outputs: list[SequenceOutput] = []
        self._replies: list[Reply] = []
        self._steps = 0
        self._collected = 0.0  # when the last step was collected
        self.broken: str | None = None  # why the engine cannot continue; its process must end
        ways = self._forward, self._advance, self._take_all, self._abandon, self._is_live
        self._isolation = Isolation(runner.device, scheduler.blocks.block_size, *ways)

    def has_work(self) -> bool:
        waiting = self._sequences or self._in_flight or self._moves or self._selftests or self._constraints
        untold = self._outputs or self._replies or self.broken
        return bool(waiting or untold) or self.residency.changed or self.merging.has_work()

    def close(self) -> None:
        """End the threads that read adapters and grammars."""
        self._constraints.close()
        self._selftests.close()
        self.residency.close()

    def handle(self, message: ToEngine) -> None:
        """Take in one message. If that fails, the message gets an error as its response and nothing else changes."""
        try:
            self._handle(message)
        except Exception:
            log.exception("%s could not be handled", type(message).__name__)
            self._refuse(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit() if message.sampling.constraint is not None:
                self._constraints.prepare(message)
            case Submit():
                self._submit(message)
            case Abort(seq_ids=seq_ids):
                for seq_id in seq_ids:
                    if seq_id in self._sequences:
                        self._finish(self._sequences[seq_id], [], FinishReason.ABORT)
                    elif self._constraints.cancel(seq_id):
                        self._outputs.append(SequenceOutput(seq_id, [], "abort"))
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

    def _refuse(self, message: ToEngine) -> None:
        match message:
            case Submit(seq_id=seq_id):
                seq = self._sequences.pop(seq_id, None)
                if seq is not None and seq in self.scheduler.waiting:
                    self.scheduler.finish(seq)
                self._outputs.append(SequenceOutput(seq_id, [], "error", error="the engine could not take the request"))
            case Abort():  # the books of a sequence that cannot be removed do not balance
                self.broken = "a sequence could not be aborted"
            case MoveAdapter() | PinAdapter() | RunSelfTest() | Merge() | Unmerge():
                self._replies.append(failure_reply(message.request_id))

    def step(self) -> list[FromEngine]:
        """Run one forward pass over all schedulable sequences; return messages, outputs first. If the engine cannot
        continue, `broken` says why, and sequences without a last output end with the engine's process."""
        started = time.perf_counter()
        batch = ScheduledBatch([])
        try:
            if self.broken is None:
                batch = self._step()
        except EngineBroken as broken:
            self.broken = str(broken)
        seconds = time.perf_counter() - started
        self.progress.took(batch.num_tokens, seconds)
        replies, self._replies = self._replies, []
        return [self._report(batch, seconds), *replies]

    def _step(self) -> ScheduledBatch:
        depth = 1 if self.overlap else 0  # steps that may be in flight when this returns
        self._collect_down_to(0 if self.merging.has_work() else depth)
        self._between_steps()
        batch = self._begin(self.scheduler.schedule())
        if batch:
            step = self._launch(batch)
            self._in_flight.append(step)
            self._collect_down_to(1)
            if self._in_flight:
                step.sample()
            if self._in_flight and not step.failed:
                self._advance(step)
            else:
                depth = 0
        self._collect_down_to(depth if batch else 0)
        return batch

    def _between_steps(self) -> None:
        """Let loads, self-tests, merges and grammars go on, and collect the replies that are due."""
        self._end_expired()
        for request, parser in self._constraints.prepared():
            self._submit(request, parser)
        self.residency.poll()
        self.merging.advance()
        self._replies += [*self._moves.poll(), *self._selftests.advance(), *self.merging.take_replies()]
        self._cancel_reads()
        if self._moves:
            self._moves.unload_retired(digests_of(self._sequences.values()))
        for seq, reason in self.scheduler.failed():
            self._finish(seq, [], FinishReason.ERROR, error=f"the adapter could not be loaded: {reason}")
        for seq in self.merging.refused():
            self._finish(seq, [], FinishReason.MERGED)

    def _end_expired(self) -> None:
        """End sequences whose deadline has passed. Those that wait never start."""
        for seq in self.scheduler.expired(time.monotonic()):
            state = "before it started" if seq.admitted is None else f"after {seq.num_output_tokens} tokens"
            self._finish(seq, [], FinishReason.TIMEOUT, error=f"the request's time ran out {state}")

    # -- sequences -----------------------------------------------------------------------------------------------

    def _submit(self, request: Submit, parser: Parser | str | None = None) -> None:
        """Queue a request, with the parser of its constraint or the reason why there is none."""
        if isinstance(parser, str):
            self._outputs.append(SequenceOutput(request.seq_id, [], "refused", error=parser))
            return
        seq = sequence_of(request)
        vocab_size = None if seq.adapters else self._runner.vocab_size(())
        problem = input_problem(seq.token_ids, seq.sampling, vocab_size)
        if problem is None and seq.num_tokens > self._max_model_len:
            problem = f"the prompt has more than {self._max_model_len - request.virtual_tokens} tokens"
        if problem is not None:
            self._outputs.append(SequenceOutput(seq.seq_id, [], "error", error=problem))
            return
        self._sequences[seq.seq_id] = seq
        if parser is not None:
            self._constraints.begin(seq, parser)
        for adapter in seq.adapters:
            self._moves.unretire(adapter.digest)
            self.residency.expect(adapter.digest)
        self.merging.arrived(seq.sole_adapter)
        self.scheduler.add(seq)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _begin(self, batch: ScheduledBatch) -> ScheduledBatch:
        """Note the first step of new sequences, and end those whose input their adapters cannot compute, now that the
        vocabulary is known. Returns the batch without them."""
        now = time.monotonic()
        refused = False
        for scheduled in batch.sequences:
            seq = scheduled.seq
            if seq.admitted is None:
                seq.admitted = now
                seq.num_cached_tokens = max(scheduled.copied_from - seq.num_virtual_tokens, 0)
                problem = seq.adapters and (
                    self._runner.pool.virtual.problem(seq.slots, seq.num_virtual_tokens)
                    or input_problem(seq.token_ids, seq.sampling, self._runner.vocab_size(seq.slots))
                )
                if problem:
                    refused = True
                    self._finish(seq, [], FinishReason.ERROR, error=problem)
        return ScheduledBatch([found for found in batch.sequences if self._is_live(found.seq)]) if refused else batch

    def _launch(self, batch: ScheduledBatch) -> InFlightStep:
        """Queue one forward pass on the device. If that fails, collecting the step raises the error."""
        self._steps += 1
        launched = time.perf_counter()
        try:
            fault_point("engine.step")
            step = self._forward(batch)
        except Exception as error:
            return failed_step(batch, error)
        step.launched = launched
        if not any(scheduled.seq.sampling.constraint for scheduled in batch.sequences):
            step.sample()  # otherwise once the step before is collected: a mask follows from the row's last token
        return step

    def _forward(self, batch: ScheduledBatch) -> InFlightStep:
        sampled = [scheduled.seq for scheduled in batch.sequences if scheduled.samples]
        self._runner.kv_cache.scrub(self.scheduler.take_suspect_blocks())
        previous = self._in_flight[-1] if self._in_flight else None
        late = None if previous is None else (previous.placeholders, previous.tokens)
        forward = self._forward_batch(batch, late)
        for scheduled in batch.sequences:
            scheduled.seq.num_launched_tokens = max(scheduled.seq.num_launched_tokens, scheduled.end)
        with self.progress.watched(batch.num_tokens):
            logits = self._runner.run(forward)
        vocab_sizes = [self._runner.vocab_size(seq.slots) for seq in sampled]
        logits, after_prompts = start_scoring_prompts(logits, batch.sequences, self._runner.vocab_size)
        after_pooled = start_collecting(forward.pooled, batch.sequences)

        def start() -> Started:
            allowed = self._constraints.masks(sampled)
            started = start_sampling(logits, sampled, self._eos_token_ids, self._token_counts, vocab_sizes, allowed)
            return Started(started.tokens, after_pooled(after_prompts(started.collect)))

        return InFlightStep(batch, start)

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

    def _collect_down_to(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._collect(self._in_flight.popleft())

    def _collect(self, step: InFlightStep) -> None:
        """Wait for the step's tokens, and give them to the sequences that have not ended meanwhile."""
        try:
            samples = step.collect()
        except Exception as error:  # of the launch, or of the device, which reports an error only now
            later, self._in_flight = self._in_flight, deque()  # launched with the tokens of this one
            self._isolation.isolate(step, later, error)
            return
        self._isolation.failed_steps = 0
        began, self._collected = max(step.launched, self._collected), time.perf_counter()
        self.scheduler.step_budget.record(step.batch, self._collected - began)
        self._take_all(step.batch, samples)

    def _take_all(self, batch: ScheduledBatch, found: list[Sample]) -> None:
        samples = iter(found)
        for scheduled in batch.sequences:
            sampled = next(samples) if scheduled.samples else None
            if sampled is not None and self._is_live(scheduled.seq):
                self._take(scheduled, sampled)
            self.scheduler.release_passed(scheduled.seq, scheduled.end)

    def _take(self, scheduled: ScheduledSequence, sampled: Sample) -> None:
        seq, end = scheduled.seq, scheduled.end
        # Prompt scores and the pool are checked with the first token, with which they are sent.
        checks_prompt = end == seq.num_prompt_tokens
        if sampled.token_id < 0 or (checks_prompt and not (is_finite(seq.prompt_logprobs) and has_finite_pool(seq))):
            self._abandon(seq, "the model produced numbers that are not finite", FinishReason.NONFINITE)
            return
        if seq.num_computed_tokens >= end:  # not if it was preempted meanwhile: those blocks are no longer its own
            self.scheduler.blocks.verify(seq, end)
        token_ids = [sampled.token_id][: seq.sampling.max_tokens]  # none if the prompt alone was wanted
        seq.token_ids[end:] = token_ids
        reason = self._finish_reason(seq, sampled.token_id)
        try:
            is_last = reason is FinishReason.STOP
            if token_ids and self._constraints.completes(seq, sampled.token_id, is_last=is_last):
                reason = FinishReason.STOP
        except ConstraintFailed as failed:
            self._finish(seq, [], FinishReason.ERROR, error=str(failed))
            return
        self._finish(seq, token_ids, reason, sampled if token_ids else None)

    def _is_live(self, seq: Sequence) -> bool:
        """Return whether the sequence has not ended while a step with it was in flight."""
        return self._sequences.get(seq.seq_id) is seq

    def _is_full(self, seq: Sequence, num_tokens: int) -> bool:
        return num_tokens - seq.num_prompt_tokens >= seq.sampling.max_tokens or num_tokens >= self._max_model_len

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.sampling
        stops = token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)
        if stops and seq.num_output_tokens >= max(params.min_tokens, 1):
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
        self._outputs.append(output_of(seq, token_ids, reason, sampled, error))
        if reason is not None:
            self.scheduler.finish(seq)
            del self._sequences[seq.seq_id]

    def _abandon(self, seq: Sequence, error: str, reason: FinishReason = FinishReason.ERROR) -> None:
        """End a sequence whose numbers went bad; nothing of what it computed can be trusted."""
        seq.num_verified_tokens = -1
        self._finish(seq, [], reason, error=error)

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
        residency = describe(self.residency) if self.residency.changed else None
        merge = self.merging.status if self.merging.changed else None
        self.residency.changed = self.merging.changed = False
        stats = measure(self.scheduler, self.residency, self._runner.graphs, batch, self._steps, seconds)
        return StepOutputs(outputs, stats, self.residency.take_moves(), residency, merge, self.merging.take_switches())

    def check_integrity(self) -> None:
        check_integrity(self.scheduler, self.residency, self._runner.pool.extra_bytes(), self._sequences)

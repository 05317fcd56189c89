"""The engine: token ids in, token ids out, one step at a time. Knows no HTTP and no text; owns no thread."""

import time
from collections import deque

from torch import nn

from adapters.fault_points import fault_point
from adapters.kernels.segments import column_runs
from adapters.residency.residency import Residency
from adapters.residency.slots import PAGE_COLUMNS
from adapters.runtime.pack import PackedAdapter
from server.engine.constraints import Constraints
from server.engine.faults import EngineBroken, input_problem
from server.engine.grammars import ConstraintFailed
from server.engine.integrity import check_integrity
from server.engine.isolation import Isolation
from server.engine.live_sequences import LiveSequences
from server.engine.merging import Merging
from server.engine.message_handler import MessageHandler
from server.engine.pipeline import PLACEHOLDER, InFlightStep, failed_step
from server.engine.progress import StepProgress
from server.engine.scheduling.scheduler import Scheduler
from server.engine.selftest import SelfTests
from server.engine.stats import describe, digests_of, measure
from server.engine.stop_rules import finish_reason, is_full
from server.ipc.messages import FromEngine, StepOutputs, ToEngine
from server.model.batch import ForwardBatch, LateTokens, build_batch
from server.model.pooling import has_finite_pool, start_collecting
from server.model.runner import ModelRunner
from server.model.sampling.prompt_logprobs import is_finite, start_scoring_prompts
from server.model.sampling.sampler import Sample, Started, start_sampling
from server.model.sampling.token_counts import TokenCounts
from server.request import FinishReason
from server.sequence import ScheduledBatch, ScheduledSequence


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
        self._constraints = constraints
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._token_counts = TokenCounts(runner.device)
        self._live = LiveSequences(scheduler)
        self._messages = MessageHandler(
            self._live, residency, selftests, merging, constraints, runner.vocab_size(()), max_model_len
        )
        self._in_flight: deque[InFlightStep] = deque()
        self._steps = 0
        self._collected = 0.0  # when the last step was collected
        self.broken: str | None = None  # why the engine cannot continue; its process must end
        ways = self._forward, self._advance, self._take_all, self._live.abandon, self._live.is_live
        self._isolation = Isolation(runner.device, scheduler.blocks.block_size, *ways)

    def has_work(self) -> bool:
        waiting = self._live.by_id or self._in_flight or self._messages.has_work()
        untold = self._live.outputs or self.broken
        return bool(waiting or untold) or self.residency.changed

    def close(self) -> None:
        """End the threads that read adapters and grammars."""
        self._messages.close()

    def handle(self, message: ToEngine) -> None:
        """Take in one message. If that fails, the message gets an error as its response and nothing else changes."""
        try:
            self._messages.handle(message)
        except EngineBroken as broken:
            self.broken = str(broken)

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
        return [self._report(batch, seconds), *self._messages.take_replies()]

    def _step(self) -> ScheduledBatch:
        depth = 1 if self.overlap else 0  # steps that may be in flight when this returns
        self._collect_down_to(0 if self.merging.has_work() or self._messages.interrupts() else depth)
        self._messages.advance()
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
                    self._live.finish(seq, FinishReason.ERROR, error=problem)
        if not refused:
            return batch
        return ScheduledBatch([scheduled for scheduled in batch.sequences if self._live.is_live(scheduled.seq)])

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
        self._runner.kv_cache.prepare(self.scheduler.take_suspect_blocks(), self.scheduler.blocks.copies)
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
            if self._live.is_live(seq):
                self.scheduler.blocks.commit(seq, scheduled.end)
                if scheduled.samples and not is_full(seq, scheduled.end + 1, self._max_model_len):
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
            if sampled is not None and self._live.is_live(scheduled.seq):
                self._take(scheduled, sampled)
            self.scheduler.release_passed(scheduled.seq, scheduled.end)

    def _take(self, scheduled: ScheduledSequence, sampled: Sample) -> None:
        seq, end = scheduled.seq, scheduled.end
        # Prompt scores and the pool are checked with the first token, with which they are sent.
        checks_prompt = end == seq.num_prompt_tokens
        if sampled.token_id < 0 or (checks_prompt and not (is_finite(seq.prompt_logprobs) and has_finite_pool(seq))):
            self._live.abandon(seq, "the model produced numbers that are not finite", FinishReason.NONFINITE)
            return
        if seq.num_computed_tokens >= end:  # not if it was preempted meanwhile: those blocks are no longer its own
            self.scheduler.blocks.verify(seq, end)
        token_ids = [sampled.token_id][: seq.sampling.max_tokens]  # none if the prompt alone was wanted
        seq.token_ids[end:] = token_ids
        reason = finish_reason(seq, sampled.token_id, self._eos_token_ids, self._max_model_len)
        try:
            is_last = reason is FinishReason.STOP
            if token_ids and self._constraints.completes(seq, sampled.token_id, is_last=is_last):
                reason = FinishReason.STOP
        except ConstraintFailed as failed:
            self._live.finish(seq, FinishReason.ERROR, error=str(failed))
            return
        known = sampled if token_ids else None
        if reason is None:
            self._live.report(seq, token_ids, known)
        else:
            self._live.finish(seq, reason, token_ids, known)

    def _forward_batch(self, batch: ScheduledBatch, late_tokens: LateTokens | None = None) -> ForwardBatch:
        sequences = [scheduled.seq for scheduled in batch.sequences if scheduled.seq.slots]
        slots = [self.residency.slots.get(digest) for digest in digests_of(sequences)]
        columns = {slot.index: column_runs(slot.pages, PAGE_COLUMNS) for slot in slots if slot}
        return build_batch(batch, self.scheduler.blocks.block_size, self._runner.device, columns, late_tokens)

    def _report(self, batch: ScheduledBatch, seconds: float) -> StepOutputs:
        residency = describe(self.residency) if self.residency.changed else None
        merge = self.merging.status if self.merging.changed else None
        self.residency.changed = self.merging.changed = False
        stats = measure(self.scheduler, self.residency, self._runner.graphs, batch, self._steps, seconds)
        outputs = self._live.take_outputs()
        return StepOutputs(outputs, stats, self.residency.take_moves(), residency, merge, self.merging.take_switches())

    def check_integrity(self) -> None:
        check_integrity(self.scheduler, self.residency, self._runner.pool.extra_bytes(), self._live.by_id)

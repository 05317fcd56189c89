"""The engine: token ids in, token ids out, one step at a time. Knows no HTTP and no text; owns no thread."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from adapters.pack import PackedAdapter
from adapters.residency import MoveRefused, Residency
from adapters.segments import Segments, build_segments, column_runs
from adapters.slots import PAGE_COLUMNS
from server.engine import messages
from server.engine.merging import Merging
from server.engine.messages import (
    Abort,
    AdapterMove,
    EngineStats,
    FromEngine,
    Merge,
    MoveAdapter,
    PinAdapter,
    Reply,
    RetireAdapter,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToEngine,
    TryAdapter,
    Unmerge,
)
from server.engine.scheduler import Scheduler
from server.engine.trials import Trials
from server.model.batch import adapter_rows, build_batch, sampled_rows
from server.model.runner import ModelRunner
from server.model.sampler import Sample, sample
from server.sequence import FinishReason, ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus

log = logging.getLogger(__name__)

_TIERS = ("disk", "host", "device")


class Engine:
    """`handle` takes in one message, `step` runs one forward pass over what is scheduled."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        residency: Residency[PackedAdapter],
        trials: Trials,
        merging: Merging,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self.scheduler = scheduler
        self.residency = residency
        self.merging = merging
        self._runner = runner
        self._trials = trials
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._sequences: dict[str, Sequence] = {}
        self._retired: set[str] = set()  # versions that no name points at: unloaded once nothing uses them
        self._pending: list[MoveAdapter | PinAdapter] = []
        self._withdrawn: list[FromEngine] = []
        self._outputs: list[SequenceOutput] = []
        self._steps = 0

    def has_work(self) -> bool:
        waiting = self._sequences or self._pending or self._trials or self._retired or self._outputs
        return bool(waiting) or self.residency.changed or self.merging.has_work()

    def close(self) -> None:
        """End the threads that read adapters."""
        self._trials.close()
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
                if isinstance(message, PinAdapter) and not message.pinned:
                    self._withdraw(message.digest, "it was unpinned meanwhile", with_moves=False)
                self.residency.expect(message.digest)
                self._pending.append(message)
            case TryAdapter():
                self._trials.add(message)
            case RetireAdapter(digest=digest):
                self._withdraw(digest, "it was deleted meanwhile", with_moves=True)
                self.residency.unpin(digest)
                self._retired.add(digest)
                self.merging.leave("retired", digest)
            case Merge():
                self.residency.expect(message.digest)
                self.merging.merge(message)
            case Unmerge(request_id=request_id):
                self.merging.unmerge(request_id)

    def step(self) -> list[FromEngine]:
        """Advance everything that can run by one forward pass; returns what there is to say, outputs first."""
        started = time.perf_counter()
        self.residency.poll()
        self.merging.advance()
        replies = [*self._settle_moves(), *self._trials.advance(), *self.merging.take_replies()]
        self._cancel_reads()
        self._unload_retired()
        for seq, reason in self.scheduler.failed():
            self._finish(seq, [], FinishReason.ERROR, error=f"the adapter could not be loaded: {reason}")
        batch = self.scheduler.schedule()
        if batch:
            self._steps += 1
            self._run(batch)
        return [self._report(batch, time.perf_counter() - started), *replies]

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
            self._retired.discard(adapter.digest)  # a name points at it again
            self.residency.expect(adapter.digest)
        self.merging.arrived(seq.sole_adapter)
        self.scheduler.add(seq)

    def _run(self, batch: ScheduledBatch) -> None:
        """One forward pass. Whatever goes wrong in it ends the sequences of this batch and nothing else."""
        now = time.monotonic()
        for scheduled in batch.sequences:
            if scheduled.seq.admitted is None:
                scheduled.seq.admitted = now
                scheduled.seq.num_cached_tokens = scheduled.start
        try:
            samples = self._forward(batch)
        except Exception:
            log.exception("a step failed; its %d sequences end with an error", len(batch.sequences))
            for scheduled in batch.sequences:
                self._abandon(scheduled.seq, "the engine failed to compute this step")
            return
        for scheduled in batch.sequences:
            self._update(scheduled, next(samples) if scheduled.samples else None)

    def _forward(self, batch: ScheduledBatch) -> Iterator[Sample]:
        sampled = [scheduled.seq for scheduled in batch.sequences if scheduled.samples]
        self._runner.kv_cache.scrub(self.scheduler.take_suspect_blocks())
        forward = build_batch(batch, self.scheduler.blocks.block_size, self._runner.device)
        logits = self._runner.run(forward, *self._segments(batch))
        vocab_sizes = [self._runner.vocab_size(seq.slots) for seq in sampled]
        return iter(sample(logits, sampled, self._eos_token_ids, vocab_sizes) if sampled else [])

    def _segments(self, batch: ScheduledBatch) -> tuple[Segments, Segments]:
        """Segments over all rows of the step, and over the sampled rows alone."""
        columns = {slot.index: column_runs(slot.pages, PAGE_COLUMNS) for slot in self.residency.slots.slots()}
        tokens = build_segments(adapter_rows(batch.sequences), columns)
        head = build_segments(sampled_rows(batch.sequences), columns)
        return tokens, head

    def _update(self, scheduled: ScheduledSequence, sampled: Sample | None) -> None:
        seq = scheduled.seq
        if sampled is not None and sampled.token_id < 0:
            self._abandon(seq, "the model produced numbers that are not finite")
            return
        self.scheduler.blocks.commit(seq, scheduled.end)
        if sampled is None:
            return
        seq.num_verified_tokens = scheduled.end
        seq.token_ids.append(sampled.token_id)
        self._finish(seq, [sampled.token_id], self._finish_reason(seq, sampled.token_id), sampled=sampled)

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.sampling
        stops = token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)
        if stops and seq.num_output_tokens >= params.min_tokens:
            return FinishReason.STOP
        if seq.num_output_tokens >= params.max_tokens or seq.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(
        self,
        seq: Sequence,
        token_ids: list[int],
        reason: FinishReason | None,
        sampled: Sample | None = None,
        error: str | None = None,
    ) -> None:
        """Say what happened to `seq`; with a reason, take it out as well."""
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

    # -- adapters ------------------------------------------------------------------------------------------------

    def _settle_moves(self) -> list[FromEngine]:
        """Answer the requested moves that are done, or cannot be."""
        replies, self._withdrawn = self._withdrawn, []
        waiting = []
        for request in self._pending:
            try:
                if not self._advance(request):
                    waiting.append(request)
                    continue
                replies.append(Reply(request.request_id))
            except MoveRefused as refused:
                replies.append(Reply(request.request_id, (refused.code, str(refused))))
        self._pending = waiting
        return replies

    def _withdraw(self, digest: str, why: str, *, with_moves: bool) -> None:
        """Refuse the version's pins, and perhaps moves, that are still on their way: done later, they would undo what
        came after them."""
        for request in [request for request in self._pending if request.digest == digest]:
            if request.pinned if isinstance(request, PinAdapter) else with_moves:
                self._pending.remove(request)
                self._withdrawn.append(Reply(request.request_id, ("busy", why)))

    def _advance(self, request: MoveAdapter | PinAdapter) -> bool:
        """Whether `request` is done; if not, it was asked of residency. Raises `MoveRefused`."""
        digest = request.digest
        if isinstance(request, PinAdapter) and not request.pinned:
            self.residency.unpin(digest)
            return True
        if isinstance(request, MoveAdapter) and request.tier == "disk":
            self.residency.unload(digest)
            return True
        self._retired.discard(digest)  # a name points at it again
        tier = request.tier if isinstance(request, MoveAdapter) else "device"
        if _TIERS.index(self.residency.where(digest)) < _TIERS.index(tier):
            self.residency.bring(digest, tier)
            return False
        if isinstance(request, PinAdapter):
            self.residency.pin(digest)
        return True

    def _cancel_reads(self) -> None:
        if self.residency.is_reading():
            moved = {request.digest for request in self._pending}
            self.residency.cancel_reads(_digests(self._sequences.values()) | moved | self._trials.digests())

    def _unload_retired(self) -> None:
        for digest in self._retired - _digests(self._sequences.values()) if self._retired else ():
            with suppress(MoveRefused):  # it is just being loaded
                self.residency.unload(digest)
                self._retired.discard(digest)

    # -- report --------------------------------------------------------------------------------------------------

    def _report(self, batch: ScheduledBatch, seconds: float) -> StepOutputs:
        outputs, self._outputs = self._outputs, []
        moves = [
            AdapterMove(m.digest, m.source, m.target, m.outcome, m.seconds, m.error)
            for m in self.residency.take_moves()
        ]
        residency = self._residency() if self.residency.changed else None
        merge = self.merging.status if self.merging.changed else None
        self.residency.changed = self.merging.changed = False
        return StepOutputs(
            outputs, self._measure(batch, seconds), moves, residency, merge, self.merging.take_switches()
        )

    def _measure(self, batch: ScheduledBatch, seconds: float) -> EngineStats:
        blocks, slots, graphs = self.scheduler.blocks, self.residency.slots, self._runner.graphs
        return EngineStats(
            steps=self._steps,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=blocks.num_used,
            blocks_total=blocks.num_blocks,
            prefix_queries=blocks.prefix_queries,
            prefix_hits=blocks.prefix_hits,
            preemptions=self.scheduler.preemptions,
            graph_steps=graphs.replayed if graphs else 0,
            eager_steps=dict(graphs.skipped) if graphs else {},
            slots_used=len(slots.slots()),
            slots_pinned=len(self.residency.pinned()),
            slots_total=slots.num_slots,
            step_seconds=seconds if batch else 0.0,
            batch_tokens=batch.num_tokens,
            batch_adapters=batch.num_adapters,
            running_adapters=sorted(_digests(self.scheduler.running)),
            waiting_adapters=sorted(_digests(self.scheduler.waiting)),
        )

    def _residency(self) -> messages.Residency:
        slots = self.residency.slots.slots()
        return messages.Residency(
            device=[slot.digest for slot in slots if slot.ready],
            host=self.residency.host.digests(),
            loading=self.residency.loading(),
            pinned=self.residency.pinned(),
            failed=self.residency.failures(),
        )

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
        self.residency.slots.check_integrity(references)
        assert {seq.seq_id for seq in [*running, *self.scheduler.waiting]} == set(self._sequences)


def _digests(sequences: Iterable[Sequence]) -> set[str]:
    return {adapter.digest for seq in sequences for adapter in seq.adapters}

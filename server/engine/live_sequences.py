"""The sequences that have not ended, and the outputs that tell of them."""

from dataclasses import dataclass, field

from server.engine.scheduling.scheduler import Scheduler
from server.engine.sequence_messages import output_of
from server.ipc.messages import SequenceOutput
from server.model.sampling.sampler import Sample
from server.request import FinishReason
from server.sequence import Sequence


@dataclass(slots=True)
class LiveSequences:
    """Invariant: a sequence is here exactly while the scheduler has it. Each ends by one output with a reason."""

    scheduler: Scheduler
    by_id: dict[str, Sequence] = field(default_factory=dict)
    outputs: list[SequenceOutput] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.by_id)

    def is_live(self, seq: Sequence) -> bool:
        """Return whether the sequence has not ended while a step with it was in flight."""
        return self.by_id.get(seq.seq_id) is seq

    def add(self, seq: Sequence) -> None:
        self.by_id[seq.seq_id] = seq
        self.scheduler.add(seq)

    def reject(self, seq_id: str, error: str | None, reason: FinishReason = FinishReason.ERROR) -> None:
        """Report that a request never became a sequence."""
        self.outputs.append(SequenceOutput(seq_id, [], reason.value, error=error))

    def report(self, seq: Sequence, token_ids: list[int], sampled: Sample | None) -> None:
        """Report new tokens of a sequence that goes on."""
        self.outputs.append(output_of(seq, token_ids, None, sampled, None))

    def finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        token_ids: list[int] | None = None,
        sampled: Sample | None = None,
        error: str | None = None,
    ) -> None:
        """Report the last tokens of a sequence, and remove it."""
        self.outputs.append(output_of(seq, token_ids or [], reason, sampled, error))
        self.scheduler.finish(seq)
        del self.by_id[seq.seq_id]

    def abandon(self, seq: Sequence, error: str, reason: FinishReason = FinishReason.ERROR) -> None:
        """End a sequence whose numbers went bad; nothing of what it computed can be trusted."""
        seq.num_verified_tokens = -1
        self.finish(seq, reason, error=error)

    def discard(self, seq_id: str) -> None:
        """Remove a sequence that could not be added whole, without an output."""
        seq = self.by_id.pop(seq_id, None)
        if seq is not None and seq in self.scheduler.waiting:
            self.scheduler.finish(seq)

    def take_outputs(self) -> list[SequenceOutput]:
        """Return the outputs since the last call."""
        outputs, self.outputs = self.outputs, []
        return outputs

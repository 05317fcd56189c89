"""The adapters of a step's rows: of all rows, and of those whose logits are wanted."""

from collections.abc import Iterable, Iterator

from adapters.kernels.segments import Rows, SlotUse
from server.sequence import ScheduledSequence


def adapter_rows(sequences: Iterable[ScheduledSequence]) -> Iterator[Rows]:
    """Yield the adapters of the step's rows, in their order."""
    for scheduled in sequences:
        yield (), scheduled.num_inactive
        yield _uses(scheduled), scheduled.num_new_tokens - scheduled.num_inactive


def head_rows(sequences: Iterable[ScheduledSequence]) -> Iterator[Rows]:
    """Yield the adapters of the rows whose logits are wanted, in their order."""
    for scheduled in sequences:
        num_inactive = min(scheduled.num_inactive, scheduled.num_scored)
        yield (), num_inactive
        yield _uses(scheduled), scheduled.num_scored - num_inactive
        if scheduled.samples:
            yield _uses(scheduled) if scheduled.end > scheduled.seq.active_from else (), 1


def _uses(scheduled: ScheduledSequence) -> tuple[SlotUse, ...]:
    seq = scheduled.seq
    if not seq.slots:  # the base, or an adapter that is merged into its weights
        return ()
    return tuple(SlotUse(slot, adapter.scale) for slot, adapter in zip(seq.slots, seq.adapters, strict=True))

"""The tokens of a step whose final hidden states are pooled to embeddings."""

from server.sequence import ScheduledSequence


def pooled_tokens(scheduled: ScheduledSequence) -> range:
    """Return the sequence's tokens of this step that are pooled, by position; virtual ones are not."""
    pooling = scheduled.seq.sampling.pooling
    if pooling == "mean":
        return range(max(scheduled.start, scheduled.seq.num_virtual_tokens), scheduled.end)
    return range(scheduled.end - 1, scheduled.end) if pooling == "last" and scheduled.samples else range(0)

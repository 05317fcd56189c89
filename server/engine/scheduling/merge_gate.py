"""The restriction of admission by a merge. Does not use torch."""

from dataclasses import dataclass

from server.sequence import Sequence


@dataclass(slots=True)
class MergeGate:
    """The restriction of admission by a merge (engine/merging.py). Closed, it admits only the `owner` version and,
    until that is merged, sequences that arrived before it was closed."""

    owner: str | None = None  # the version that is merged or about to be
    closed: float = 0.0  # time of closing; other sequences that arrived later wait
    merged: bool = False

    def close(self, owner: str, now: float) -> None:
        self.owner, self.closed = owner, now

    def open(self) -> None:
        self.owner, self.merged = None, False

    def admits(self, seq: Sequence) -> bool:
        if self.owner is None or seq.sole_adapter == self.owner:
            return True
        return not self.merged and seq.arrival <= self.closed

    def in_base(self, seq: Sequence) -> bool:
        """Return whether the adapter of `seq` is merged, so that it runs like the base model, without a slot."""
        return self.merged and seq.sole_adapter == self.owner

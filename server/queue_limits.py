"""Limits of the queue: who may wait with how many sequences and tokens. Knows no HTTP and no engine.

The room of the queue is divided like the buffer of a switch (Choudhury and Hahne, "Dynamic Queue Length Thresholds for
Shared-Memory Packet Switches", 1998): what a tenant has waiting may be at most as large as the room that it leaves to
others, times its weight in relation to the heaviest tenant that waits. One tenant alone can take half of the queue, two
can take a third each, and a tenant that has nothing waiting may bring one sequence while any room is left.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class _Sequence(NamedTuple):
    tenant: str
    tokens: int


class Waiting:
    """The sequences that were submitted and have had no output yet, by tenant."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Sequence] = {}
        self._sequences: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._weights: dict[str, float] = {}

    def submitted(self, seq_id: str, tenant: str, weight: float, tokens: int) -> None:
        self._waiting[seq_id] = _Sequence(tenant, tokens)
        self._sequences[tenant] += 1
        self._tokens[tenant] += tokens
        self._weights[tenant] = weight

    def left(self, seq_id: str) -> None:
        """Record that a sequence started or ended. Sequences that do not wait are ignored."""
        seq = self._waiting.pop(seq_id, None)
        if seq is None:
            return
        self._sequences[seq.tenant] -= 1
        self._tokens[seq.tenant] -= seq.tokens
        if not self._sequences[seq.tenant]:
            del self._sequences[seq.tenant], self._tokens[seq.tenant], self._weights[seq.tenant]

    def clear(self) -> None:
        for counter in (self._waiting, self._sequences, self._tokens, self._weights):
            counter.clear()

    def sequences(self, tenant: str | None = None) -> int:
        """Return the number of waiting sequences of `tenant`, or of all."""
        return len(self._waiting) if tenant is None else self._sequences[tenant]

    def tokens(self, tenant: str | None = None) -> int:
        """Return the number of prompt tokens of the waiting sequences of `tenant`, or of all."""
        return self._tokens.total() if tenant is None else self._tokens[tenant]

    def heaviest(self) -> float:
        """Return the largest weight of a tenant that waits; 0 if none does."""
        return max(self._weights.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why a request may not wait. `of_tenant`: its tenant holds its share of the queue (HTTP 429); otherwise
    the queue as a whole has no room for it (HTTP 503)."""

    of_tenant: bool
    message: str


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`shared`: there are several tenants. A tenant that is the only one may fill the queue."""

    max_sequences: int
    max_tokens: int
    shared: bool = True
    waiting: Waiting = field(default_factory=Waiting)

    @property
    def full(self) -> bool:
        """Return whether nobody may wait."""
        return self.waiting.sequences() >= self.max_sequences or self.waiting.tokens() >= self.max_tokens

    def refusal(self, tenant: str, weight: float, sequences: int, tokens: int) -> Refusal | None:
        """Return the reason why a request of so many sequences, with so many prompt tokens together, may not wait, or
        None. An empty queue takes any request."""
        waiting = self.waiting
        if not waiting.sequences():
            return None
        share = weight / max(weight, waiting.heaviest())
        own = waiting.sequences(tenant)
        for unit, capacity, total, mine, more in (
            ("sequences", self.max_sequences, waiting.sequences(), own, sequences),
            ("prompt tokens", self.max_tokens, waiting.tokens(), waiting.tokens(tenant), tokens),
        ):
            room = capacity - total - more  # that the request would leave
            if room < 0:
                why = f"{total} {unit} wait, and the queue holds {capacity}; the request has {more}."
                return Refusal(False, f"The queue is full: {why}")
            first = own == 0 and sequences == 1  # a tenant that has nothing waiting may bring one sequence
            if self.shared and not first and mine + more > share * room:
                return self._over_share(unit, own, mine, more)
        return None

    def _over_share(self, unit: str, own: int, mine: int, more: int) -> Refusal:
        if own:
            return Refusal(
                True, f"This key's tenant has {mine} {unit} waiting, its share of the queue; try again later."
            )
        return Refusal(False, f"The queue has no room for {more} {unit} of one request; try again later.")

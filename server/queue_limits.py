"""Limits of the queue: who may wait with how many sequences and tokens. Knows no HTTP and no engine.

The room of the queue is divided like the buffer of a switch (Choudhury and Hahne, "Dynamic Queue Length Thresholds for
Shared-Memory Packet Switches", 1998): what a tenant has waiting may be at most as large as the room that it leaves to
others, times its weight in relation to the heaviest tenant that waits. One tenant alone can take half of the queue, two
can take a third each, and a tenant that has nothing waiting may bring one sequence while any room is left.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from server.departures import Departures, Unit


class _Sequence(NamedTuple):
    tenant: str
    tokens: int


class Waiting:
    """The sequences that were submitted and have had no output yet, by tenant."""

    def __init__(self, departures: Departures | None = None) -> None:
        self.departures = departures or Departures()
        self._waiting: dict[str, _Sequence] = {}
        self._sequences: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._weights: dict[str, float] = {}

    def submitted(self, seq_id: str, tenant: str, weight: float, tokens: int) -> None:
        self.departures.begin_busy()
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
        self.departures.add(seq.tenant, seq.tokens)
        if not self._waiting:
            self.departures.end_busy()

    def clear(self) -> None:
        self.departures.end_busy()
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
    the queue as a whole has no room for it (HTTP 503). `seconds`: when there may be room, at the rate of late."""

    of_tenant: bool
    message: str
    seconds: int


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

    def full_for(self) -> int:
        """Return for how many seconds nobody may wait, at the rate of late."""
        waiting, seconds = self.waiting, self.waiting.departures.seconds
        over = waiting.sequences() - self.max_sequences, waiting.tokens() - self.max_tokens
        return max(seconds(max(over[0] + 1, 0), "sequences"), seconds(max(over[1] + 1, 0), "prompt tokens"))

    def refusal(self, tenant: str, weight: float, sequences: int, tokens: int) -> Refusal | None:
        """Return the reason why a request of so many sequences, with so many prompt tokens together, may not wait, or
        None. An empty queue takes any request."""
        if not self.waiting.sequences():
            return None
        share = weight / max(weight, self.waiting.heaviest())
        is_first = not self.waiting.sequences(tenant) and sequences == 1  # it may come while any room is left
        found = (
            self._refusal_by("sequences", tenant, sequences, share, is_first),
            self._refusal_by("prompt tokens", tenant, tokens, share, is_first),
        )
        refusals = [refusal for refusal in found if refusal is not None]
        return replace(refusals[0], seconds=max(each.seconds for each in refusals)) if refusals else None

    def _refusal_by(self, unit: Unit, tenant: str, more: int, share: float, is_first: bool) -> Refusal | None:
        count, capacity = self.waiting.sequences, self.max_sequences
        if unit == "prompt tokens":
            count, capacity = self.waiting.tokens, self.max_tokens
        total, mine = count(), count(tenant)
        room = capacity - total - more  # that the request would leave
        if room < 0:
            why = f"{total} {unit} wait, and the queue holds {capacity}; the request has {more}."
            return Refusal(False, f"The queue is full: {why}", self.waiting.departures.seconds(-room, unit))
        if self.shared and not is_first and mine + more > share * room:
            return self._over_share(unit, tenant, mine, more, share, room)
        return None

    def _over_share(self, unit: Unit, tenant: str, mine: int, more: int, share: float, room: int) -> Refusal:
        """Each sequence of the tenant that leaves takes one from it and adds `share` to what it may have."""
        seconds = self.waiting.departures.seconds
        if self.waiting.sequences(tenant):
            why = f"This key's tenant has {mine} {unit} waiting, its share of the queue; try again later."
            return Refusal(True, why, seconds((mine + more - share * room) / (1 + share), unit, tenant))
        why = f"The queue has no room for {more} {unit} of one request; try again later."
        return Refusal(False, why, seconds(more / share - room, unit))

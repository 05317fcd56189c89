"""Scheduling policies: the order in which waiting sequences are considered, and which running ones are preempted. Uses
neither torch nor a clock.

A policy tracks a sequence while it waits: from its arrival until it is admitted, and again after a preemption.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Protocol

from server.sequence import NO_BLOCK, Sequence

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # per token, as in the VTC paper: an output token takes a step of its own


class Policy(Protocol):
    """The order of waiting sequences."""

    def arrived(self, seq: Sequence) -> None: ...

    def left(self, seq: Sequence) -> None:
        """Record that `seq` no longer waits: it was admitted or aborted."""

    def returned(self, seq: Sequence) -> None:
        """Record that `seq` waits again because it was preempted."""

    def charge(self, seq: Sequence, *, prompt: int = 0, generated: int = 0) -> None:
        """Charge the tenant of `seq` for computed tokens."""

    def order(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yield the sequences of `waiting`, given in order of arrival, in the order to consider them. Lazy, so that
        charges between two of them affect the rest."""

    def victim(self, running: list[Sequence]) -> Sequence:
        """Return the sequence to preempt when memory is short; `running` is in order of admission. It is not the first
        one unless that is alone, so the first one always advances to its end."""


class FirstCome:
    """Orders sequences by arrival, regardless of tenant and priority."""

    def arrived(self, seq: Sequence) -> None: ...

    def left(self, seq: Sequence) -> None: ...

    def returned(self, seq: Sequence) -> None: ...

    def charge(self, seq: Sequence, *, prompt: int = 0, generated: int = 0) -> None: ...

    def order(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        return iter(waiting)

    def victim(self, running: list[Sequence]) -> Sequence:
        return running[-1]


class FairShare:
    """Orders tenants by the service received, least first: the Virtual Token Counter of Sheng et al., "Fairness in
    Serving Large Language Models" (OSDI 2024), with weights. Within a tenant, overdue sequences come first, then the
    most urgent priority, then the earliest arrival.

    Tokens found in the prefix cache and tokens recomputed after a preemption are not charged.
    """

    def __init__(self) -> None:
        self._served: defaultdict[str, float] = defaultdict(
            float
        )  # by tenant: cost of its tokens divided by its weight
        self._waiting: Counter[str] = Counter()  # by tenant: sequences that wait
        self._last_left = 0.0  # the counter of the last tenant that left the queue

    def arrived(self, seq: Sequence) -> None:
        """Raise the counter of a returning tenant to that of waiting tenants, so that idle time earns no service."""
        if not self._waiting[seq.tenant]:
            others = (self._served[tenant] for tenant, count in self._waiting.items() if count)
            level = min(others, default=self._last_left)
            self._served[seq.tenant] = max(self._served[seq.tenant], level)
        self._waiting[seq.tenant] += 1

    def returned(self, seq: Sequence) -> None:
        """Count a preempted sequence. Its tenant was not idle, so its counter stays."""
        self._waiting[seq.tenant] += 1

    def left(self, seq: Sequence) -> None:
        self._waiting[seq.tenant] -= 1
        if not self._waiting[seq.tenant]:
            del self._waiting[seq.tenant]
            self._last_left = self._served[seq.tenant]

    def charge(self, seq: Sequence, *, prompt: int = 0, generated: int = 0) -> None:
        self._served[seq.tenant] += (INPUT_COST * prompt + OUTPUT_COST * generated) / seq.weight

    def order(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        queues: defaultdict[str, list[Sequence]] = defaultdict(list)
        for seq in waiting:
            queues[seq.tenant].append(seq)
        for queue in queues.values():
            queue.sort(key=_within_tenant, reverse=True)  # the next one is the last
        heap = [(self._served[tenant], queue[-1].number, tenant) for tenant, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            _, _, tenant = heapq.heappop(heap)
            queue = queues[tenant]
            yield queue.pop()
            if queue:
                heapq.heappush(heap, (self._served[tenant], queue[-1].number, tenant))

    def victim(self, running: list[Sequence]) -> Sequence:
        """Return the least urgent sequence of the tenant that holds the most KV blocks in relation to its weight, and
        among equally urgent ones the newest."""
        held: defaultdict[str, float] = defaultdict(float)
        for seq in running:
            held[seq.tenant] += (len(seq.block_table) - seq.block_table.count(NO_BLOCK)) / seq.weight
        candidates = list(enumerate(running))[1:] or [(0, running[0])]
        return max(candidates, key=lambda place: (held[place[1].tenant], place[1].priority, place[0]))[1]


def _within_tenant(seq: Sequence) -> tuple[bool, int, int]:
    return not seq.overdue, seq.priority, seq.number

"""In which order waiting sequences are tried: one small class per policy. Pure accounting, no torch, no clock.

A policy sees a sequence from its arrival until it is first admitted. Those that were preempted have had their turn and
are not asked about again.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Protocol

from server.sequence import Sequence

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # of a token, as in the VTC paper: an output token takes a step of its own


class Policy(Protocol):
    def arrived(self, seq: Sequence) -> None: ...

    def left(self, seq: Sequence) -> None:
        """It waits no longer: admitted for the first time, or aborted."""

    def charge(self, seq: Sequence, *, prompt: int = 0, generated: int = 0) -> None:
        """So many tokens are computed for it."""

    def order(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        """`waiting`, which comes in order of arrival, in the order to try. Lazy: what is charged between two of them
        counts for the rest."""


class FirstCome:
    """In order of arrival, whoever asks."""

    def arrived(self, seq: Sequence) -> None: ...

    def left(self, seq: Sequence) -> None: ...

    def charge(self, seq: Sequence, *, prompt: int = 0, generated: int = 0) -> None: ...

    def order(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        return iter(waiting)


class FairShare:
    """The tenant that was served least goes first: the Virtual Token Counter of Sheng et al., "Fairness in Serving
    Large Language Models" (OSDI 2024), with weights. Within a tenant the most urgent priority goes first, then the
    earliest; who was passed over for too long goes before both.

    Tokens found in the prefix cache and tokens computed again after a preemption cost nothing.
    """

    def __init__(self) -> None:
        self._served: defaultdict[str, float] = defaultdict(float)  # by tenant: cost of its tokens by its weight
        self._waiting: Counter[str] = Counter()  # by tenant: sequences that were never admitted
        self._last_left = 0.0  # the counter of the tenant that was last to leave the queue

    def arrived(self, seq: Sequence) -> None:
        """A tenant that comes back is lifted to those that wait: it cannot save up service while it asks for none."""
        if not self._waiting[seq.tenant]:
            others = (self._served[tenant] for tenant, count in self._waiting.items() if count)
            level = min(others, default=self._last_left)
            self._served[seq.tenant] = max(self._served[seq.tenant], level)
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


def _within_tenant(seq: Sequence) -> tuple[bool, int, int]:
    return not seq.overdue, seq.priority, seq.number

"""Aging: counts the steps in which a waiting sequence was overtaken, and holds back those that compete with it.

A sequence ages in a step if it lacked something that a later sequence had in the step before. It does not age while its
adapters are read for the first time or copied, while a merge keeps it out, or while the engine is idle, because no
other sequence causes those waits. A sequence that was overtaken more than `max_wait_steps` times is overdue: until it
is admitted, later sequences that need what it lacks are held back, and no others are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.sequence import Sequence

# What a sequence needs to run, and what it may compete for: bits of an int, because flags of `enum` take microseconds.
ROOM = 1  # a place in the step and KV blocks: every sequence
SLOT = 2  # a device slot with pages: sequences with adapters that are not pinned
LOAD = 4  # a load: sequences with adapters that are not on the device
PREFIX = 8  # keys and values that a running sequence computes; nobody competes for them
NOTHING = 0
_CONTESTED = (ROOM, SLOT, LOAD)


@dataclass(slots=True)
class Aging:
    max_wait_steps: int
    _latest: dict[int, int] = field(default_factory=dict)  # by need: the latest sequence that had it in the last step
    _overdue: dict[int, int] = field(default_factory=dict)  # by need: the earliest overdue sequence that lacks it

    def begin_step(self) -> None:
        self._overdue.clear()

    def holds_back(self, seq: Sequence, needs: int) -> bool:
        """Return whether `seq` arrived after an overdue sequence that lacks something `seq` needs."""
        return any(need & needs and seq.number > number for need, number in self._overdue.items())

    def pass_over(self, seq: Sequence, lacks: int) -> None:
        """Record that `seq` was considered in this step and lacks this."""
        if any(need & lacks and seq.number < number for need, number in self._latest.items()):
            self.overtake(seq)
        if seq.overdue:
            for need in _CONTESTED:
                if need & lacks:
                    self._overdue[need] = min(seq.number, self._overdue.get(need, seq.number))

    def overtake(self, seq: Sequence) -> None:
        seq.waited_steps += 1
        seq.overdue = seq.waited_steps > self.max_wait_steps

    def end_step(self, had: Iterable[tuple[int, int]]) -> None:
        """Record the needs of this step's sequences, with the sequences' numbers. Empty steps record nothing, so that
        the polls of an idle engine do not count."""
        self._latest.clear()
        for needs, number in had:
            for need in _CONTESTED:
                if need & needs and number > self._latest.get(need, -1):
                    self._latest[need] = number

"""Aging: counts the steps in which a waiting sequence was overtaken, and holds back those that compete with it.

A sequence ages in a step if it lacked something that a later sequence had in the step before. It does not age while its
adapter is read or copied, while a merge keeps it out, or while the engine is idle, because no other sequence causes
those waits. A sequence that was overtaken more than `max_wait_steps` times is overdue: until it is admitted, later
sequences that need what it lacks are held back, and no others are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Flag, auto

from server.sequence import Sequence


class Need(Flag):
    """What a sequence needs to run, and what it may compete for."""

    ROOM = auto()  # a place in the step and KV blocks: every sequence
    SLOT = auto()  # a device slot with pages: sequences with adapters that are not pinned
    LOAD = auto()  # a load: sequences with adapters that are not on the device
    PREFIX = auto()  # keys and values that a running sequence computes; nobody competes for them


NOTHING = Need(0)


@dataclass(slots=True)
class Aging:
    max_wait_steps: int
    _latest: dict[Need, int] = field(default_factory=dict)  # by need: the latest sequence that had it in the last step
    _overdue: dict[Need, int] = field(default_factory=dict)  # by need: the earliest overdue sequence that lacks it

    def begin_step(self) -> None:
        self._overdue.clear()

    def holds_back(self, seq: Sequence, needs: Need) -> bool:
        """Return whether `seq` arrived after an overdue sequence that lacks something `seq` needs."""
        return any(need in needs and seq.number > number for need, number in self._overdue.items())

    def pass_over(self, seq: Sequence, lacks: Need) -> None:
        """Record that `seq` was considered in this step and lacks this."""
        if any(need in lacks and seq.number < number for need, number in self._latest.items()):
            self.overtake(seq)
        if seq.overdue:
            for need in lacks:
                self._overdue[need] = min(seq.number, self._overdue.get(need, seq.number))

    def overtake(self, seq: Sequence) -> None:
        seq.waited_steps += 1
        seq.overdue = seq.waited_steps > self.max_wait_steps

    def end_step(self, had: Iterable[tuple[Need, int]]) -> None:
        """Record the needs of this step's sequences, with the sequences' numbers. Empty steps record nothing, so that
        the polls of an idle engine do not count."""
        self._latest.clear()
        for needs, number in had:
            for need in needs:
                self._latest[need] = max(number, self._latest.get(need, -1))

"""The restriction of the scheduler by a pause. Does not use torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from server.sequence import Sequence


@dataclass(slots=True)
class PauseGate:
    """The restriction of the scheduler by a pause (engine/interruptions.py). Closed, it admits no sequence that arrived
    later; frozen, no sequence takes part in a step."""

    frozen: bool = False
    closed_from: float = math.inf  # number of the first sequence that is not admitted

    def close(self, sequences: Iterable[Sequence]) -> None:
        """Admit `sequences`, which are all that there are, and none that arrive from now on."""
        if self.closed_from == math.inf:
            self.closed_from = max((seq.number for seq in sequences), default=-1) + 1

    def open(self) -> None:
        self.frozen, self.closed_from = False, math.inf

    def admits(self, seq: Sequence) -> bool:
        return seq.number < self.closed_from

"""Structures of adapters that passed a self-test, so that a trainer's next version need not be tested again."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from adapters.records import Inspected

_MOST_STRUCTURES = 1024
MOST_BYTES = 32 << 20  # of a version that needs no test of its own: larger ones take time to load anyway
GROWTH = 2.0  # beyond what was tested, by which the numbers of a version may be larger without a test of its own


class _Passed(NamedTuple):
    digest: str
    largest: float


@dataclass(slots=True)
class TestedStructures:
    """The structures that passed a self-test since this process started, each with the version that was tested last.

    What the self-test compares follows from the structure: which tensors apply where, in which form and with which
    scale. The numbers matter to it in two ways only. Zeros hide errors, so a version with a tensor of zeros proves
    nothing. Large numbers overflow, so a version with much larger ones is tested itself.
    """

    _passed: "OrderedDict[str, _Passed]" = field(default_factory=OrderedDict)

    def passed(self, inspected: Inspected) -> None:
        """Note that this version passed the self-test."""
        if inspected.structure is None or inspected.has_zeros:
            return
        self._passed[inspected.structure] = _Passed(inspected.digest, inspected.largest)
        self._passed.move_to_end(inspected.structure)
        if len(self._passed) > _MOST_STRUCTURES:
            self._passed.popitem(last=False)

    def version_like(self, inspected: Inspected) -> str | None:
        """Return the digest of the version whose self-test covers this one, or None."""
        tested = self._passed.get(inspected.structure or "")
        if tested is None or inspected.nbytes > MOST_BYTES or inspected.largest > GROWTH * tested.largest:
            return None
        return tested.digest

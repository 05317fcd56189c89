"""Which rows of a step belong to which adapter: built once per step, read by every layer. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `[start, end)` of the batch take the rank columns `[lo, hi)` of the pool, `scale` times."""

    start: int
    end: int
    lo: int
    hi: int
    scale: float = 1.0


class SlotUse(NamedTuple):
    """A row takes the adapter in `slot`, `scale` times."""

    slot: int
    scale: float = 1.0


Rows = tuple[tuple[SlotUse, ...], int]  # what so many neighbouring rows take: nothing is the base model


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows `[start, end)` of the batch belong to `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of base requests are in no segment. A row range has a segment per adapter and run of adjacent pages of it,
    one after the other; their deltas add up. `rows` has the same rows by slot."""

    items: tuple[Segment, ...]
    rows: tuple[SlotRows, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.items)


NO_SEGMENTS = Segments(())


def column_runs(pages: Iterable[int], page_columns: int) -> list[tuple[int, int]]:
    """Merge adjacent pages into runs of columns: pages [3, 4, 7] of 16 are columns [48, 80) and [112, 128)."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        lo, hi = page * page_columns, (page + 1) * page_columns
        if runs and runs[-1][1] == lo:
            runs[-1] = (runs[-1][0], hi)
        else:
            runs.append((lo, hi))
    return runs


def build_segments(rows: Iterable[Rows], columns_of_slot: dict[int, list[tuple[int, int]]]) -> Segments:
    """Segments of a batch from its rows in order. Neighbours that take the same become one segment; what is taken zero
    times is left out, so that it cannot even overflow."""
    items: list[Segment] = []
    owned: list[SlotRows] = []
    end = 0
    for uses, group in groupby((row for row in rows if row[1]), key=itemgetter(0)):
        start, end = end, end + sum(count for _, count in group)
        for slot, scale in uses:
            if scale:
                owned.append(SlotRows(slot, start, end))
                items += (Segment(start, end, lo, hi, scale) for lo, hi in columns_of_slot[slot])
    return Segments(tuple(items), tuple(owned))

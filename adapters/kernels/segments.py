"""Assignment of a step's rows to adapters: built once per step, read by every layer. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `[start, end)` of the batch use the rank columns `[lo, hi)` of the pool, multiplied by `scale`."""

    start: int
    end: int
    lo: int
    hi: int
    scale: float = 1.0


class SlotUse(NamedTuple):
    """A row's use of the adapter in `slot`, multiplied by `scale`."""

    slot: int
    scale: float = 1.0


Rows = tuple[tuple[SlotUse, ...], int]  # the adapters of that many adjacent rows; none for the base model


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows `[start, end)` of the batch belong to `slot`, whose adapter is multiplied by `scale`."""

    slot: int
    start: int
    end: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a step. Rows of base requests are in no segment. A range of rows has one segment per adapter
    and run of its adjacent pages, in sequence; their deltas add up. `rows` has the same rows by slot."""

    items: tuple[Segment, ...]
    rows: tuple[SlotRows, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.items)


NO_SEGMENTS = Segments(())


def column_runs(pages: Iterable[int], page_columns: int) -> list[tuple[int, int]]:
    """Combine adjacent pages into runs of columns: pages [3, 4, 7] of 16 are columns [48, 80) and [112, 128)."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        lo, hi = page * page_columns, (page + 1) * page_columns
        if runs and runs[-1][1] == lo:
            runs[-1] = (runs[-1][0], hi)
        else:
            runs.append((lo, hi))
    return runs


def build_segments(rows: Iterable[Rows], columns_of_slot: dict[int, list[tuple[int, int]]]) -> Segments:
    """Build the segments of a batch from its rows in order. Adjacent rows with the same adapters become one segment;
    an adapter with scale 0 is omitted, so that it cannot overflow."""
    items: list[Segment] = []
    owned: list[SlotRows] = []
    end = 0
    for uses, group in groupby((row for row in rows if row[1]), key=itemgetter(0)):
        start, end = end, end + sum(count for _, count in group)
        for slot, scale in uses:
            if scale:
                owned.append(SlotRows(slot, start, end, scale))
                items += (Segment(start, end, lo, hi, scale) for lo, hi in columns_of_slot[slot])
    return Segments(tuple(items), tuple(owned))

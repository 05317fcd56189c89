"""Which rows of a step belong to which adapter: built once per step, read by every layer. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `[start, end)` of the batch take the rank columns `[lo, hi)` of the pool."""

    start: int
    end: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows `[start, end)` of the batch belong to `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows of base requests are in no segment. An adapter whose pages are not adjacent has one segment per run of
    pages over the same rows; their deltas add up. `rows` has the same rows by slot, each once."""

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


def build_segments(rows: Iterable[tuple[int, int]], columns_of_slot: dict[int, list[tuple[int, int]]]) -> Segments:
    """Segments of a batch from `(slot, number of rows)` in batch order; slot -1 is the base.

    Neighbouring entries of one slot become one segment.
    """
    owned = tuple(r for r in _merged(rows) if r.slot >= 0 and r.end > r.start)
    return Segments(tuple(Segment(r.start, r.end, lo, hi) for r in owned for lo, hi in columns_of_slot[r.slot]), owned)


def _merged(rows: Iterable[tuple[int, int]]) -> list[SlotRows]:
    merged: list[SlotRows] = []
    position = 0
    for slot, count in rows:
        if merged and merged[-1].slot == slot:
            merged[-1] = SlotRows(slot, merged[-1].start, position + count)
        else:
            merged.append(SlotRows(slot, position, position + count))
        position += count
    return merged

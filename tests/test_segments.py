"""Which rows of a step take which rank columns."""

import random

import pytest

from adapters.segments import NO_SEGMENTS, Segment, SlotRows, build_segments, column_runs


def test_adjacent_pages_are_one_run_of_columns() -> None:
    assert column_runs([3, 4, 7], 16) == [(48, 80), (112, 128)]
    assert column_runs([7, 4, 3], 16) == [(48, 80), (112, 128)]
    assert column_runs([0], 16) == [(0, 16)]
    assert column_runs([], 16) == []


def test_rows_of_one_adapter_are_one_segment() -> None:
    segments = build_segments([(-1, 3), (0, 1), (0, 4), (2, 1)], {0: [(0, 16)], 2: [(16, 32)]})
    assert segments.items == (Segment(3, 8, 0, 16), Segment(8, 9, 16, 32))
    assert segments.rows == (SlotRows(0, 3, 8), SlotRows(2, 8, 9))


def test_an_adapter_on_scattered_pages_has_a_segment_per_run_over_the_same_rows() -> None:
    segments = build_segments([(1, 2)], {1: [(0, 16), (48, 64)]})
    assert segments.items == (Segment(0, 2, 0, 16), Segment(0, 2, 48, 64))
    assert segments.rows == (SlotRows(1, 0, 2),)


@pytest.mark.parametrize("rows", [[], [(-1, 5)], [(-1, 5), (-1, 1)], [(0, 0)]])
def test_without_adapters_there_are_no_segments(rows: list[tuple[int, int]]) -> None:
    segments = build_segments(rows, {0: [(0, 16)]})
    assert segments == NO_SEGMENTS
    assert not segments


@pytest.mark.parametrize("seed", range(20))
def test_every_row_takes_exactly_the_columns_of_its_slot(seed: int) -> None:
    chance = random.Random(seed)
    pages = random.Random(seed).sample(range(20), 9)
    pages_of_slot = {0: pages[:1], 1: pages[1:3], 2: pages[3:7], 3: pages[7:]}
    columns = {slot: column_runs(owned, 4) for slot, owned in pages_of_slot.items()}
    rows = sorted((chance.randint(-1, 3), chance.randint(0, 5)) for _ in range(10))
    segments = build_segments(rows, columns)
    slot_of_row = [slot for slot, count in rows for _ in range(count)]
    for row, slot in enumerate(slot_of_row):
        taken = sorted(c for s in segments.items if s.start <= row < s.end for c in range(s.lo, s.hi))
        owned = sorted(page * 4 + c for page in pages_of_slot.get(slot, []) for c in range(4))
        assert taken == owned
    assert all(s.end <= len(slot_of_row) for s in segments.items)

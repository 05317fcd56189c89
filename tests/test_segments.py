"""Assignment of a step's rows to rank columns."""

import random

import pytest

from adapters.kernels.segments import NO_SEGMENTS, Rows, Segment, SlotRows, SlotUse, build_segments, column_runs


def test_adjacent_pages_are_one_run_of_columns() -> None:
    assert column_runs([3, 4, 7], 16) == [(48, 80), (112, 128)]
    assert column_runs([7, 4, 3], 16) == [(48, 80), (112, 128)]
    assert column_runs([0], 16) == [(0, 16)]
    assert column_runs([], 16) == []


A, B = SlotUse(0), SlotUse(2)


def test_rows_of_one_adapter_are_one_segment() -> None:
    segments = build_segments([((), 3), ((A,), 1), ((), 0), ((A,), 4), ((B,), 1)], {0: [(0, 16)], 2: [(16, 32)]})
    assert segments.items == (Segment(3, 8, 0, 16), Segment(8, 9, 16, 32))
    assert segments.rows == (SlotRows(0, 3, 8), SlotRows(2, 8, 9))


def test_an_adapter_on_scattered_pages_has_a_segment_per_run_over_the_same_rows() -> None:
    segments = build_segments([((A,), 2)], {0: [(0, 16), (48, 64)]})
    assert segments.items == (Segment(0, 2, 0, 16), Segment(0, 2, 48, 64))
    assert segments.rows == (SlotRows(0, 0, 2),)


def test_a_composition_has_the_segments_of_all_its_adapters_over_the_same_rows() -> None:
    both = (SlotUse(0, 0.5), SlotUse(2, -1.0))
    columns = {0: [(0, 16), (48, 64)], 2: [(16, 32)]}
    segments = build_segments([((A,), 1), (both, 2), (both, 1), ((B,), 1)], columns)
    assert segments.items == (
        *(Segment(0, 1, 0, 16), Segment(0, 1, 48, 64)),
        *(Segment(1, 4, 0, 16, 0.5), Segment(1, 4, 48, 64, 0.5), Segment(1, 4, 16, 32, -1.0)),
        Segment(4, 5, 16, 32),
    )


def test_an_adapter_with_scale_zero_is_left_out() -> None:
    columns = {0: [(0, 16)], 2: [(16, 32)]}
    assert build_segments([((SlotUse(0, 0.0),), 3)], columns) == NO_SEGMENTS
    assert build_segments([((SlotUse(0, 0.0), B), 3)], columns) == build_segments([((B,), 3)], columns)


@pytest.mark.parametrize("rows", [[], [((), 5)], [((), 5), ((), 1)], [((A,), 0)]])
def test_without_adapters_there_are_no_segments(rows: list[Rows]) -> None:
    segments = build_segments(rows, {0: [(0, 16)]})
    assert segments == NO_SEGMENTS
    assert not segments


@pytest.mark.parametrize("seed", range(20))
def test_every_row_takes_exactly_the_columns_of_its_slots(seed: int) -> None:
    chance = random.Random(seed)
    pages = random.Random(seed).sample(range(20), 9)
    pages_of_slot = {0: pages[:1], 1: pages[1:3], 2: pages[3:7], 3: pages[7:]}
    columns = {slot: column_runs(owned, 4) for slot, owned in pages_of_slot.items()}
    rows: list[Rows] = []
    for _ in range(10):
        slots = sorted(chance.sample(range(4), chance.randint(0, 3)))
        rows.append((tuple(SlotUse(slot, chance.choice([1.0, 0.5])) for slot in slots), chance.randint(0, 5)))
    segments = build_segments(rows, columns)
    uses_of_row = [uses for uses, count in rows for _ in range(count)]
    for row, uses in enumerate(uses_of_row):
        taken = sorted((c, s.scale) for s in segments.items if s.start <= row < s.end for c in range(s.lo, s.hi))
        owned = sorted((page * 4 + c, use.scale) for use in uses for page in pages_of_slot[use.slot] for c in range(4))
        assert taken == owned
    assert all(s.end <= len(uses_of_row) for s in segments.items)

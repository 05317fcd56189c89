"""Assignment of versions to device slots and pages."""

import random

import pytest

from adapters.residency.slots import PAGE_COLUMNS, SlotTable


def fill(table: SlotTable, digest: str, num_pages: int = 1) -> list[str]:
    """Reserve a slot and mark it ready; return the evicted digests."""
    slot, evicted = table.reserve(digest, num_pages)
    assert slot is not None
    slot.ready = True
    return evicted


def digests(table: SlotTable) -> list[str]:
    return [slot.digest for slot in table.slots()]


def test_pages_are_taken_by_native_rank() -> None:
    table = SlotTable(num_slots=4, num_pages=8)
    small, _ = table.reserve("rank 16", -(-16 // PAGE_COLUMNS))
    large, _ = table.reserve("rank 64", -(-64 // PAGE_COLUMNS))
    assert small is not None and large is not None
    assert len(small.pages) * 4 == len(large.pages)
    assert sorted(small.pages + large.pages) == [0, 1, 2, 3, 4]  # together at the front of the pool
    table.check_integrity({})


def test_the_least_recently_used_version_is_evicted() -> None:
    table = SlotTable(num_slots=2, num_pages=8)
    fill(table, "a")
    fill(table, "b")
    table.touch("a")
    assert fill(table, "c") == ["b"]
    assert digests(table) == ["a", "c"]
    table.check_integrity({})


def test_only_as_many_are_evicted_as_are_needed() -> None:
    table = SlotTable(num_slots=4, num_pages=4)
    for digest in "abcd":
        fill(table, digest)
    assert fill(table, "wide", num_pages=2) == ["a", "b"]
    table.check_integrity({})


@pytest.mark.parametrize("state", ["in use", "pinned", "still loading"])
def test_versions_in_use_pinned_or_loading_are_not_evicted(state: str) -> None:
    table = SlotTable(num_slots=2, num_pages=2)
    fill(table, "a")
    fill(table, "b")
    slot = table.get("a")
    assert slot is not None
    slot.ref_count = int(state == "in use")
    slot.pinned = state == "pinned"
    slot.ready = state != "still loading"
    assert fill(table, "c") == ["b"]
    assert digests(table) == ["a", "c"]


def test_nothing_is_evicted_when_it_would_not_help() -> None:
    table = SlotTable(num_slots=2, num_pages=4)
    fill(table, "idle", num_pages=1)
    fill(table, "busy", num_pages=3)
    busy = table.get("busy")
    assert busy is not None
    busy.ref_count = 1
    assert table.reserve("wide", num_pages=2) == (None, [])
    assert digests(table) == ["idle", "busy"]
    table.check_integrity({"busy": 1})


def test_a_version_larger_than_the_pool_gets_no_slot() -> None:
    table = SlotTable(num_slots=2, num_pages=4)
    fill(table, "idle")
    assert table.reserve("huge", num_pages=5) == (None, [])
    assert digests(table) == ["idle"]


def test_a_slot_in_use_cannot_be_dropped() -> None:
    table = SlotTable(num_slots=1, num_pages=1)
    fill(table, "a")
    slot = table.get("a")
    assert slot is not None
    slot.ref_count = 1
    with pytest.raises(AssertionError, match="in use"):
        table.drop("a")


def test_integrity_notices_a_reference_that_nobody_holds() -> None:
    table = SlotTable(num_slots=1, num_pages=1)
    fill(table, "a")
    with pytest.raises(AssertionError):
        table.check_integrity({"a": 1})
    with pytest.raises(AssertionError):
        table.check_integrity({"gone": 1})


@pytest.mark.parametrize("seed", range(10))
def test_after_any_operations_slots_and_pages_add_up(seed: int) -> None:
    chance = random.Random(seed)
    table = SlotTable(num_slots=4, num_pages=9)
    references: dict[str, int] = {}
    for _ in range(400):
        digest = chance.choice("abcdefgh")
        slot = table.get(digest)
        action = chance.random()
        if slot is None:
            before = digests(table)
            reserved, evicted = table.reserve(digest, chance.randint(1, 4))
            assert set(evicted) <= set(before)
            assert not any(references.get(victim) for victim in evicted)
            if reserved is None:
                assert digests(table) == before
            else:
                assert len(set(reserved.pages)) == len(reserved.pages)
        elif action < 0.3:
            slot.ready = True
        elif action < 0.6 and slot.ready:
            slot.ref_count += 1
            references[digest] = slot.ref_count
        elif action < 0.8 and slot.ref_count:
            slot.ref_count -= 1
            references[digest] = slot.ref_count
        elif action < 0.9:
            slot.pinned = not slot.pinned
        elif slot.ref_count == 0:
            table.drop(digest)
        table.check_integrity(references)

"""Which versions may be on the device together."""

import random

import pytest

from adapters.residency.room import shortage_of


@pytest.mark.parametrize(
    ("pages", "pinned", "expected"),
    [
        ({}, {}, None),
        ({"a": 1, "b": 3}, {}, None),
        ({"a": 1, "b": 1, "c": 1}, {}, "slots"),
        ({"a": 1, "b": 4}, {}, "pages"),
        ({"a": 5}, {}, "pages"),
        ({"a": 1, "b": 1}, {"c": 1}, "beside_pinned"),  # by slots
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}, None),  # the pinned ones are those requested
        ({"a": 4}, {"c": 1}, None),  # a single version waits
    ],
)
def test_what_is_short_on_a_device_of_two_slots_and_four_pages(
    pages: dict[str, int], pinned: dict[str, int], expected: str | None
) -> None:
    assert shortage_of(pages, pinned, num_slots=2, num_pages=4) == expected


def test_unpinning_never_makes_room_short() -> None:
    chance = random.Random(16)
    for _ in range(500):
        pages, pinned = ({f"{i}": chance.randint(1, 3) for i in range(chance.randint(0, 4))} for _ in range(2))
        num_slots, num_pages = chance.randint(1, 5), chance.randint(1, 9)
        if shortage_of(pages, pinned, num_slots, num_pages) is None:
            assert shortage_of(pages, {}, num_slots, num_pages) is None

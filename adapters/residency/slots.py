"""Assignment of versions to device slots and pages. Only accounting: the tensors are in `adapters.runtime.pool`.

A batch row refers to a slot; the slot's pages are the rank columns that hold the version's weights, 16 to a page, by
native rank: a rank-16 adapter takes one page where a rank-64 one takes four. Pages are allocated lowest first, so that
the pages in use stay together at the front of the pool. What a version keeps on the device beside its pages (whole
weights, vectors) counts in bytes.
"""

import heapq
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

PAGE_COLUMNS = 16


def pages_of(rank: int) -> int:
    """Return the number of pages for `rank`."""
    return max(1, -(-rank // PAGE_COLUMNS))


@dataclass(slots=True)
class Slot:
    """A device slot and the version in it."""

    index: int
    digest: str
    pages: list[int]
    extra_bytes: int = 0  # on the device, beside the pages
    ready: bool = False  # set last, when every copy has completed
    ref_count: int = 0  # number of running sequences that use the slot
    pinned: bool = False

    @property
    def evictable(self) -> bool:
        return self.ready and self.ref_count == 0 and not self.pinned


@dataclass(slots=True)
class SlotTable:
    """Slots in order of last use; a version is in at most one slot and every page in at most one slot.
    `max_extra_bytes` bounds what all versions keep beside their pages. `on_drop` is told the index of every slot that
    is freed."""

    num_slots: int
    num_pages: int
    max_extra_bytes: int = sys.maxsize
    on_drop: Callable[[int], None] = lambda _: None
    _slots: "OrderedDict[str, Slot]" = field(init=False, default_factory=OrderedDict)
    _free_slots: list[int] = field(init=False)
    _free_pages: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots))
        self._free_pages = list(range(self.num_pages))

    def get(self, digest: str) -> Slot | None:
        return self._slots.get(digest)

    def slots(self) -> list[Slot]:
        """Return the slots, least recently used first."""
        return list(self._slots.values())

    def touch(self, digest: str) -> None:
        """Mark the version's slot as the most recently used one."""
        self._slots.move_to_end(digest)

    @property
    def extra_bytes(self) -> int:
        """Bytes that the versions keep on the device beside their pages."""
        return sum(slot.extra_bytes for slot in self._slots.values())

    def reserve(self, digest: str, num_pages: int, extra_bytes: int = 0) -> tuple[Slot | None, list[str]]:
        """Reserve a slot (not yet ready) with `num_pages` pages and `extra_bytes` bytes, evicting idle versions, least
        recently used first.

        Returns the slot and the digests evicted for it; None and no digests when evicting every idle version would not
        be enough.
        """
        victims = self._victims(num_pages, extra_bytes)
        if victims is None:
            return None, []
        for victim in victims:
            self.drop(victim)
        pages = [heapq.heappop(self._free_pages) for _ in range(num_pages)]
        slot = self._slots[digest] = Slot(heapq.heappop(self._free_slots), digest, pages, extra_bytes)
        return slot, victims

    def _victims(self, num_pages: int, extra_bytes: int) -> list[str] | None:
        victims: list[str] = []
        slots, pages = len(self._free_slots), len(self._free_pages)
        extra = self.max_extra_bytes - self.extra_bytes

        def enough() -> bool:
            return slots >= 1 and pages >= num_pages and extra >= extra_bytes

        for slot in self._slots.values():
            if enough():
                break
            if slot.evictable:
                victims.append(slot.digest)
                slots, pages, extra = slots + 1, pages + len(slot.pages), extra + slot.extra_bytes
        return victims if enough() else None

    def drop(self, digest: str) -> None:
        """Free the version's slot and pages. The slot must not be in use."""
        slot = self._slots.pop(digest)
        assert slot.ref_count == 0, f"slot {slot.index} is in use"
        heapq.heappush(self._free_slots, slot.index)
        for page in slot.pages:
            heapq.heappush(self._free_pages, page)
        self.on_drop(slot.index)

    def check_integrity(self, references: dict[str, int]) -> None:
        """Raise AssertionError unless slots and pages add up and reference counts equal `references` (by digest)."""
        slots = self._free_slots + [slot.index for slot in self._slots.values()]
        pages = self._free_pages + [page for slot in self._slots.values() for page in slot.pages]
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert sorted(pages) == list(range(self.num_pages)), pages
        assert self.extra_bytes <= self.max_extra_bytes, self.extra_bytes
        for slot in self._slots.values():
            assert slot.ref_count == references.get(slot.digest, 0), slot
        assert all(digest in self._slots for digest, count in references.items() if count), references

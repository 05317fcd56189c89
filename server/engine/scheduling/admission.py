"""Admission of a waiting sequence: the adapters' slots and the KV blocks that it needs to run. Does not use torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.kv_blocks.shared_tails import copy_tail, is_being_verified, tail_in
from server.engine.scheduling.aging import LOAD, NOTHING, PREFIX, ROOM, SLOT
from server.engine.scheduling.merge_gate import MergeGate
from server.sequence import Sequence


class AdapterSlots(Protocol):
    """The interface of residency (adapters/residency/residency.py) that the scheduler uses."""

    def acquire(self, digest: str) -> int | None:
        """Take a reference on the version's device slot. If it has none, request a load and return None."""

    def release(self, digest: str) -> None: ...

    def where(self, digest: str) -> str:
        """Return the tier of the version; on "device" it has a slot to acquire."""

    def is_being_read(self, digest: str) -> bool: ...

    def is_being_copied(self, digest: str) -> bool:
        """Return whether the version has a slot that it is being copied to."""

    def is_pinned(self, digest: str) -> bool:
        """Return whether the version has a slot that no other version can get."""

    def fit(self, digests: Iterable[str]) -> bool:
        """Return whether these versions fit on the device together, beside the pinned ones."""

    def prefetch(self, digest: str) -> None:
        """Load a version that is needed soon from disk to host memory."""

    def failure(self, digest: str) -> str | None:
        """Return the reason why the last load of the version failed, if it did."""


@dataclass(slots=True)
class Admission:
    blocks: BlockManager
    adapters: AdapterSlots
    gate: MergeGate

    def needs(self, seq: Sequence) -> int:
        """Return what `seq` needs to run: for admission while it waits, and for the step once it runs."""
        if not seq.adapters or self.gate.in_base(seq) or all(map(self.adapters.is_pinned, seq.digests)):
            return ROOM
        return ROOM | SLOT if seq.slots or self._on_device(seq) else ROOM | SLOT | LOAD

    def _on_device(self, seq: Sequence) -> bool:
        return all(self.adapters.where(digest) == "device" for digest in seq.digests)

    def failure(self, seq: Sequence) -> str | None:
        """Return why `seq` can never be admitted, if its adapters cannot be loaded."""
        if len(seq.adapters) > 1 and not self.adapters.fit(digest for digest, _ in seq.adapters):
            return f"{len(seq.adapters)} adapters do not fit on the device beside the pinned ones"
        for digest, _ in seq.adapters:
            reason = self.adapters.failure(digest)
            if reason is not None:
                return reason
        return None

    def acquire(self, seq: Sequence, running: list[Sequence], collected: list[str], may_load: bool) -> int | None:
        """Acquire the adapters' slots, the cached prefix and the KV blocks for `seq`, and return None. If refused,
        return what it lacks and other sequences have; then only slots in `collected` stay acquired.

        Without `may_load` no load is requested: the host cache could not hold the adapters of a long queue.
        """
        if not self.gate.admits(seq):
            return NOTHING
        slots: tuple[int, ...] = ()
        if not self.gate.in_base(seq):
            if not (may_load or self._on_device(seq)):
                return LOAD
            self._note_reads(seq)
            acquired = self._acquire_all(seq, collected)
            if acquired is None:
                return self._lacks_slots(seq)
            slots = acquired
        lacks = self._acquire_blocks(seq, running)
        if lacks is None:
            seq.slots = slots
        elif slots:
            collected += seq.digests
        return lacks

    def release_slots(self, seq: Sequence) -> None:
        if seq.slots:
            for digest in seq.digests:
                self.adapters.release(digest)
        seq.slots = ()

    def _acquire_blocks(self, seq: Sequence, running: list[Sequence]) -> int | None:
        matched = self.blocks.match_prefix(seq) if self.blocks.may_fit(seq) else None
        if matched is None:
            return ROOM
        lacks = self._lacks_blocks(seq, matched, running)
        if lacks is None:
            self.blocks.admit(seq, matched)
            copy_tail(self.blocks, seq, running)
        return lacks

    def _lacks_blocks(self, seq: Sequence, matched: list[int], running: list[Sequence]) -> int | None:
        """Return None if `seq` has the KV blocks to run. It lacks its PREFIX while a running sequence computes blocks
        that save it at least half of its prefill, or the last tokens of a prompt that both have."""
        num_missing = seq.num_tokens - len(matched) * self.blocks.block_size
        for other in running:
            num_saved = self.blocks.being_computed(seq, len(matched), other) * self.blocks.block_size
            if num_saved and 2 * num_saved >= num_missing:
                return PREFIX
            if is_being_verified(other) and tail_in(other, seq, len(matched), self.blocks.block_size):
                return PREFIX
        return None if self.blocks.can_admit(seq, matched) else ROOM

    def _note_reads(self, seq: Sequence) -> None:
        """Record which adapters of `seq` have been read. One that was requested, is not being read and is on disk was
        read and evicted from host memory."""
        for digest in seq.digests if len(seq.read) < len(seq.adapters) else ():
            was_evicted = seq.requested and not self.adapters.is_being_read(digest)
            if was_evicted or self.adapters.where(digest) != "disk":
                seq.read.add(digest)
        seq.requested = True

    def _lacks_slots(self, seq: Sequence) -> int:
        """Return what `seq` lacks for its adapters: NOTHING until each has been read once, and while those that are not
        on the device are being copied there. One that is read again lost its place in host memory to others."""
        missing = [digest for digest in seq.digests if self.adapters.where(digest) != "device"]
        first_reads = len(seq.read) < len(seq.adapters)
        return NOTHING if first_reads or all(map(self.adapters.is_being_copied, missing)) else SLOT

    def _acquire_all(self, seq: Sequence, collected: list[str]) -> tuple[int, ...] | None:
        """Acquire the slots of all adapters of `seq`, or return None and add those acquired to `collected`.

        Adapters on the device are acquired first, because requesting a missing one may evict unreferenced adapters.
        """
        slots: dict[str, int] = {}
        for digest, _ in sorted(seq.adapters, key=lambda adapter: self.adapters.where(adapter.digest) != "device"):
            slot = self.adapters.acquire(digest)
            if slot is not None:
                slots[digest] = slot
        if len(slots) < len(seq.adapters):
            collected.extend(slots)
            return None
        return tuple(slots[digest] for digest, _ in seq.adapters)

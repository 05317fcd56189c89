"""Location of each version, and the moves between the tiers disk, host and device. No torch in here.

All methods run on the engine's thread and return at once. Reading, validating and copying happen in reader threads;
their results return through a queue that `poll` empties. A slot is marked ready last, after its copy has completed.
"""

import logging
import queue
import time
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from adapters.errors import AdapterError, MoveRefused
from adapters.residency.host_cache import HostCache
from adapters.residency.room import shortage_of
from adapters.residency.slots import Slot, SlotTable
from adapters.tiers import AdapterMove, Tier

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # minimum time between two attempts to load a version that failed


class Packed(Protocol):
    """A packed version: its number of pages, its size in bytes, and the part of it that is not in pages."""

    @property
    def num_pages(self) -> int: ...

    @property
    def extra_bytes(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Packed)


@dataclass(slots=True)
class _Done(Generic[P]):
    """Report of a reader thread: a version read into host memory, or a slot filled."""

    digest: str
    started: float
    packed: P | None = None
    slot: Slot | None = None
    error: str | None = None


class Residency(Generic[P]):
    """Moves versions to the tiers where they are needed.

    `read(digest)` reads, validates and packs a version; `write(slot, packed)` copies it into the slot's pages. Reads
    run in reader threads or in `executor`, and may raise `AdapterError`. Copies run in a thread of their own or in
    `copier`, because a version in host memory must not wait for the reads of others. `max_pages` is the number of pages
    of the largest version served: pins always leave room for one such version. Urgent loads have a thread of their own,
    whose priority may be higher. `keep(digest, packed)` is called in the
    reader thread after it has reported the version as read, for work that nobody waits for.
    """

    def __init__(
        self,
        slots: SlotTable,
        host: HostCache[P],
        read: Callable[[str], P],
        write: Callable[[Slot, P], None],
        max_pages: int = 1,
        threads: int = 2,
        on_thread_start: Callable[[], None] = lambda: None,
        on_urgent_start: Callable[[], None] = lambda: None,
        executor: Executor | None = None,
        copier: Executor | None = None,
        keep: Callable[[str, P], None] = lambda *_: None,
    ) -> None:
        self.slots = slots
        self.host = host
        self._max_pages = max_pages
        self._read = read
        self._write = write
        self._keep = keep
        self._threads = executor or ThreadPoolExecutor(threads, "adapter-reader", initializer=on_thread_start)
        self._copier = copier or ThreadPoolExecutor(1, "adapter-copier", initializer=on_thread_start)
        self._hurry = executor or ThreadPoolExecutor(1, "adapter-urgent", initializer=on_urgent_start)
        self._urgent: set[str] = set()  # versions to be read and copied by that thread
        self._done: queue.SimpleQueue[_Done[P]] = queue.SimpleQueue()
        self._reading: dict[str, Future[None]] = {}
        self._failed: dict[str, tuple[str, float]] = {}
        self._moves: list[AdapterMove] = []
        self.changed = False  # set when the result of `where` or `loading` changes; the reader clears it

    # -- for the scheduler ---------------------------------------------------------------------------------------

    def acquire(self, digest: str) -> int | None:
        """Take a reference on the version's slot and return the slot's index; if the version is not on the device
        yet, request it and return None."""
        slot = self.slots.get(digest)
        if slot is None or not slot.ready:
            self.request(digest)
            self._refuse_if_hopeless(digest)
            return None
        slot.ref_count += 1
        self.slots.touch(digest)
        return slot.index

    def release(self, digest: str) -> None:
        """Give back a reference taken by `acquire`."""
        slot = self.slots.get(digest)
        assert slot is not None and slot.ref_count > 0, digest
        slot.ref_count -= 1

    def fit(self, digests: Iterable[str]) -> bool:
        """Return True if these versions fit on the device together, beside the pinned ones."""
        pages = {digest: self._num_pages(digest) for digest in digests}
        return self._fit(pages) and self._fits_beside_pinned(pages)

    def _fit(self, pages: dict[str, int]) -> bool:
        return shortage_of(pages, self.pinned(), self.slots.num_slots, self.slots.num_pages) is None

    def _num_pages(self, digest: str) -> int:
        """Return the pages of a version in memory; 1, the minimum, for any other."""
        slot, packed = self.slots.get(digest), self.host.peek(digest)
        return len(slot.pages) if slot is not None else packed.num_pages if packed is not None else 1

    def _fits_beside_pinned(self, digests: Iterable[str]) -> bool:
        """Return True if what these versions and the pinned ones keep beside their pages fits."""
        together = {*digests, *self.pinned()}
        return sum(map(self._extra_bytes, together)) <= self.slots.max_extra_bytes

    def _leaves_half(self, slot: Slot) -> bool:
        """Return True if at most half of the bytes beside the pages is pinned once `slot` is as well."""
        pinned = sum(self._extra_bytes(digest) for digest in self.pinned())
        return pinned + slot.extra_bytes <= self.slots.max_extra_bytes // 2

    def _extra_bytes(self, digest: str) -> int:
        """Return what a version in memory keeps beside its pages; 0, the minimum, for any other."""
        slot, packed = self.slots.get(digest), self.host.peek(digest)
        return slot.extra_bytes if slot is not None else packed.extra_bytes if packed is not None else 0

    def _refuse_if_hopeless(self, digest: str) -> None:
        """Fail a version that would wait for as long as the pinned ones stay."""
        if self.slots.get(digest) is None and digest in self.host and not self._fits_beside_pinned([digest]):
            reason = (
                f"it keeps {self._extra_bytes(digest)} bytes beside its rank columns, and pinned adapters leave less"
            )
            self._failed[digest] = (f"{reason}; unpin one or raise --adapter-override-bytes", time.monotonic())
            self.changed = True

    def failure(self, digest: str) -> str | None:
        """Return the reason why the version failed to load, or None."""
        failed = self._failed.get(digest)
        return failed[0] if failed else None

    def prefetch(self, digest: str) -> None:
        """Read a version into host memory ahead of its use, as long as nothing has to be evicted for it."""
        if not self.host.is_full():
            self._read_to_host(digest)

    def _read_to_host(self, digest: str) -> None:
        if digest in self._reading or digest in self._failed or self.slots.get(digest) or digest in self.host:
            return
        urgent = digest in self._urgent
        threads = self._hurry if urgent else self._threads
        self._reading[digest] = threads.submit(self._read_job, digest, keeps=not urgent)
        self.changed = True

    def is_reading(self) -> bool:
        """Return True while versions are being read."""
        return bool(self._reading)

    def cancel_reads(self, wanted: Container[str]) -> None:
        """Cancel the reads of all versions that are not `wanted`. A read that has begun completes, and its result
        stays in host memory."""
        for digest, read in list(self._reading.items()):
            if digest not in wanted and read.cancel():
                del self._reading[digest]
                self.changed = True

    # -- moves ---------------------------------------------------------------------------------------------------

    def request(self, digest: str) -> None:
        """Move a version to the device, through host memory, when a slot is available. Call again until it is there."""
        if digest in self._failed or self.slots.get(digest) is not None:
            return
        packed = self.host.get(digest)
        if packed is None:
            self._read_to_host(digest)
            return
        slot, evicted = self.slots.reserve(digest, packed.num_pages, packed.extra_bytes)
        for victim in evicted:
            self._note(AdapterMove(victim, "device", "host" if victim in self.host else "disk", "ok", 0.0))
        if slot is not None:
            self.changed = True
            copier = self._hurry if digest in self._urgent else self._copier
            copier.submit(self._write_job, slot, packed)
            self._urgent.discard(digest)

    def bring(self, digest: str, tier: Tier, *, urgent: bool = False) -> None:
        """Carry out an explicit load; call on every step until it is done. Raises `MoveRefused`. A failure stays in the
        version's record until another attempt succeeds."""
        if urgent:
            self._urgent.add(digest)
        failed = self._failed.get(digest)
        if failed is not None:
            raise MoveRefused("invalid", failed[0])
        if tier == "host":
            self._read_to_host(digest)
            return
        self.request(digest)
        if digest in self.host and self.slots.get(digest) is None:
            raise MoveRefused("no_room", "every device slot is pinned or in use")

    def expect(self, digest: str) -> None:
        """Note a new request for the version: if it failed to load more than `RETRY_SECONDS` ago, allow another
        attempt."""
        failed = self._failed.get(digest)
        if failed is not None and time.monotonic() - failed[1] > RETRY_SECONDS:
            self.forget_failure(digest)

    def forget_failure(self, digest: str) -> None:
        """Allow another attempt to load the version at once: its stored files were published again."""
        if self._failed.pop(digest, None) is not None:
            self.changed = True

    def unload(self, digest: str) -> None:
        """Free device and host memory. Raises `MoveRefused` while the version is in use, loading or pinned."""
        slot = self.slots.get(digest)
        if slot is not None and slot.pinned:
            raise MoveRefused("busy", "the adapter is pinned; unpin it first")
        if (slot is not None and (slot.ref_count > 0 or not slot.ready)) or digest in self._reading:
            raise MoveRefused("busy", "the adapter is in use or being loaded")
        self.forget_failure(digest)
        self._urgent.discard(digest)
        if slot is not None:
            self.slots.drop(digest)
            self._note(AdapterMove(digest, "device", "disk", "ok", 0.0))
        elif digest in self.host:
            self._note(AdapterMove(digest, "host", "disk", "ok", 0.0))
        self.host.drop(digest)

    def pin(self, digest: str) -> None:
        """Protect a resident version from eviction. Raises `MoveRefused` when no room would be left for other
        versions."""
        slot = self.slots.get(digest)
        assert slot is not None, digest
        if not slot.pinned and not self._fit({digest: len(slot.pages), "another": self._max_pages}):
            raise MoveRefused("no_room", "pinning it would leave no room for other adapters on the device")
        if not slot.pinned and slot.extra_bytes and not self._leaves_half(slot):
            raise MoveRefused(
                "no_room", "pinned adapters may keep half of --adapter-override-bytes, so that others load"
            )
        slot.pinned = True
        self.changed = True

    def unpin(self, digest: str) -> None:
        """Allow eviction of the version again."""
        slot = self.slots.get(digest)
        if slot is not None:
            slot.pinned = False
            self.changed = True

    def pinned(self) -> dict[str, int]:
        """Return the number of pages of each pinned version."""
        return {slot.digest: len(slot.pages) for slot in self.slots.slots() if slot.pinned}

    def where(self, digest: str) -> Tier:
        """Return the fastest tier that holds the version."""
        slot = self.slots.get(digest)
        if slot is not None and slot.ready:
            return "device"
        return "host" if digest in self.host else "disk"

    def is_being_read(self, digest: str) -> bool:
        return digest in self._reading

    def is_being_copied(self, digest: str) -> bool:
        slot = self.slots.get(digest)
        return slot is not None and not slot.ready

    def is_pinned(self, digest: str) -> bool:
        slot = self.slots.get(digest)
        return slot is not None and slot.pinned

    def loading(self) -> list[str]:
        """Return the digests of the versions being read or copied, sorted."""
        return sorted(self._reading.keys() | {slot.digest for slot in self.slots.slots() if not slot.ready})

    def take_moves(self) -> list[AdapterMove]:
        """Return the moves since the last call."""
        moves, self._moves = self._moves, []
        return moves

    def failures(self) -> dict[str, str]:
        """Return the reason of failure of each version that failed to load."""
        return {digest: reason for digest, (reason, _) in self._failed.items()}

    def poll(self) -> None:
        """Take over the results of the reader threads. Callers that want a version request it again, in queue order:
        if `poll` moved it on, two versions that wait for one slot would evict each other before either is used."""
        while not self._done.empty():
            self._finish(self._done.get())

    def check_integrity(self, references: dict[str, int], kept: Mapping[int, int]) -> None:
        """Raise AssertionError unless the slots add up and `kept`, the bytes by slot that are on the device beside the
        pages, are those of the account."""
        self.slots.check_integrity(references)
        slots = {slot.index: slot for slot in self.slots.slots()}
        assert kept.keys() <= slots.keys(), kept
        for slot in slots.values():
            assert not slot.ready or kept.get(slot.index, 0) == slot.extra_bytes, slot

    def close(self) -> None:
        """Wait for the threads to end; pending reads and copies are cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._copier.shutdown(wait=True, cancel_futures=True)
        self._hurry.shutdown(wait=True, cancel_futures=True)

    # -- reader threads ------------------------------------------------------------------------------------------

    def _read_job(self, digest: str, *, keeps: bool = True) -> None:
        done: _Done[P] = _Done(digest, time.monotonic())
        try:
            done.packed = self._read(digest)
            if done.packed.num_pages > self.slots.num_pages:
                done.error = (
                    f"it needs {done.packed.num_pages} pages of rank columns, and the device has {self.slots.num_pages}"
                )
            elif done.packed.extra_bytes > self.slots.max_extra_bytes:
                done.error = (
                    f"it keeps {done.packed.extra_bytes} bytes of whole weights and vectors beside its rank columns, "
                    f"and the device has {self.slots.max_extra_bytes} for them; raise --adapter-override-bytes"
                )
        except AdapterError as error:
            done.error = str(error)
        except Exception:  # without a report, sequences would wait for the version forever
            log.exception("reading adapter %s failed", digest)
            done.error = "reading it failed; the server's log has the reason"
        packed = done.packed if done.error is None else None
        self._done.put(done)
        if packed is not None and keeps:  # an urgent version is likely to be replaced before it is read again
            self._keep_job(digest, packed)

    def _keep_job(self, digest: str, packed: P) -> None:
        try:
            self._keep(digest, packed)
        except Exception:
            log.exception("keeping adapter %s in packed form failed", digest)

    def _write_job(self, slot: Slot, packed: P) -> None:
        done: _Done[P] = _Done(slot.digest, time.monotonic(), slot=slot)
        try:
            self._write(slot, packed)
        except Exception:
            log.exception("copying adapter %s to the device failed", slot.digest)
            done.error = "copying it to the device failed; the server's log has the reason"
        self._done.put(done)

    def _finish(self, done: _Done[P]) -> None:
        seconds = time.monotonic() - done.started
        source: Tier = "host" if done.slot is not None else "disk"
        target: Tier = "device" if done.slot is not None else "host"
        if done.slot is None:
            del self._reading[done.digest]
        if done.error is not None:
            self._failed[done.digest] = (done.error, time.monotonic())
            if done.slot is not None:
                self.slots.drop(done.digest)
            self._note(AdapterMove(done.digest, source, target, "failed", seconds, done.error))
            return
        if done.slot is not None:
            done.slot.ready = True
        elif done.packed is not None:
            for victim in self.host.put(done.digest, done.packed):
                self._note(AdapterMove(victim, "host", "disk", "ok", 0.0))
        self._note(AdapterMove(done.digest, source, target, "ok", seconds))

    def _note(self, move: AdapterMove) -> None:
        self._moves.append(move)
        self.changed = True

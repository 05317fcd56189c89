"""Moves of versions between disk, host and device, and the handling of failed moves."""

import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from adapters.errors import AdapterInvalid, MoveRefused, Problem
from adapters.residency import residency as residency_module
from adapters.residency.host_cache import HostCache
from adapters.residency.residency import RETRY_SECONDS, Residency
from adapters.residency.slots import Slot, SlotTable
from adapters.tiers import AdapterMove
from tests.fixtures.timing import HANG_SECONDS, Clock, patience


@dataclass(frozen=True)
class Weights:
    digest: str
    num_pages: int
    nbytes: int
    extra_bytes: int = 0


@dataclass
class Tiers:
    """Disk and device of a test: their content, blocked and failing operations, and the number of accesses."""

    sizes: dict[str, int] = field(default_factory=dict)  # pages; one byte each
    extras: dict[str, int] = field(default_factory=dict)  # bytes on the device beside the pages
    read_errors: dict[str, BaseException] = field(default_factory=dict)
    write_errors: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)  # "read x", "write x": waits until it is set
    reads: Counter[str] = field(default_factory=Counter)
    begun: list[str] = field(default_factory=list)  # "read x", "write x"
    pages: dict[int, str] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)  # by slot, bytes beside the pages

    def hold(self, name: str) -> threading.Event:
        self.gates[name] = threading.Event()
        return self.gates[name]

    def read(self, digest: str) -> Weights:
        self.reads[digest] += 1
        self._pass("read " + digest)
        if digest in self.read_errors:
            raise self.read_errors[digest]
        pages = self.sizes.get(digest, 1)
        return Weights(digest, pages, nbytes=pages, extra_bytes=self.extras.get(digest, 0))

    def drop(self, slot: int) -> None:
        self.kept.pop(slot, None)

    def write(self, slot: Slot, packed: Weights) -> None:
        self._pass("write " + packed.digest)
        if packed.digest in self.write_errors:
            raise self.write_errors[packed.digest]
        for page in slot.pages:
            self.pages[page] = packed.digest
        if packed.extra_bytes:
            self.kept[slot.index] = packed.extra_bytes

    def _pass(self, name: str) -> None:
        self.begun.append(name)
        if name in self.gates:
            assert self.gates[name].wait(HANG_SECONDS)


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    made = Tiers()
    yield made
    for gate in made.gates.values():
        gate.set()


@pytest.fixture
def residency(tiers: Tiers) -> Iterator[Residency[Weights]]:
    """Three slots of eight pages, ten bytes of host memory."""
    yield from opened(tiers, num_slots=3)


@pytest.fixture
def single(tiers: Tiers) -> Iterator[Residency[Weights]]:
    """One slot."""
    yield from opened(tiers, num_slots=1)


@pytest.fixture
def roomy(tiers: Tiers) -> Iterator[Residency[Weights]]:
    """Six slots, and versions of up to four of the eight pages."""
    yield from opened(tiers, num_slots=6, max_pages=4)


def opened(tiers: Tiers, num_slots: int, max_pages: int = 1) -> Iterator[Residency[Weights]]:
    slots = SlotTable(num_slots, 8, max_extra_bytes=100, on_drop=tiers.drop)
    made: Residency[Weights] = Residency(slots, HostCache(10), tiers.read, tiers.write, max_pages)
    yield made
    for gate in tiers.gates.values():
        gate.set()
    made.close()


def wait_until(residency: Residency[Weights], condition: Callable[[], object]) -> None:
    for _ in patience("it"):
        if condition():
            break
        residency.poll()
        time.sleep(0.001)


def acquire(residency: Residency[Weights], digest: str) -> int:
    """Request the version on every step, as the scheduler does, until it is there."""
    got: list[int] = []

    def ask() -> bool:
        slot = residency.acquire(digest)
        if slot is not None:
            got.append(slot)
        return bool(got)

    wait_until(residency, ask)
    return got[0]


def moves(residency: Residency[Weights]) -> list[tuple[str, str, str, str]]:
    return [(move.digest, move.source, move.target, move.outcome) for move in residency.take_moves()]


def test_a_requested_version_is_loaded_through_the_host(residency: Residency[Weights], tiers: Tiers) -> None:
    assert residency.where("a") == "disk"
    assert residency.acquire("a") is None
    slot = acquire(residency, "a")
    assert residency.where("a") == "device"
    held = residency.slots.get("a")
    assert held is not None and held.index == slot
    assert [tiers.pages[page] for page in held.pages] == ["a"]
    assert moves(residency) == [("a", "disk", "host", "ok"), ("a", "host", "device", "ok")]
    assert residency.take_moves() == []
    residency.slots.check_integrity({"a": 1})
    residency.release("a")
    residency.slots.check_integrity({})


def test_many_requests_for_one_version_read_it_once(residency: Residency[Weights], tiers: Tiers) -> None:
    gate = tiers.hold("read a")
    for _ in range(20):
        assert residency.acquire("a") is None
        residency.prefetch("a")
        residency.poll()
    assert residency.loading() == ["a"]
    gate.set()
    acquire(residency, "a")
    assert residency.acquire("a") is not None
    assert tiers.reads["a"] == 1
    residency.slots.check_integrity({"a": 2})


def test_a_read_that_nobody_waits_for_does_not_begin(residency: Residency[Weights], tiers: Tiers) -> None:
    gates = [tiers.hold("read a"), tiers.hold("read b")]  # both threads are busy
    for digest in "abcd":
        assert residency.acquire(digest) is None
    wait_until(residency, lambda: tiers.reads.total() == 2)
    residency.changed = False
    residency.cancel_reads({"a", "d"})
    assert residency.changed and residency.loading() == ["a", "b", "d"]
    residency.unload("c")  # nothing of it is left
    for gate in gates:
        gate.set()
    wait_until(residency, lambda: not residency.is_reading())
    assert sorted(residency.host.digests()) == ["a", "b", "d"]  # b had begun
    assert tiers.reads == {"a": 1, "b": 1, "d": 1}
    acquire(residency, "c")
    assert tiers.reads["c"] == 1


def test_a_slot_is_ready_only_after_its_copy_arrived(residency: Residency[Weights], tiers: Tiers) -> None:
    gate = tiers.hold("write a")
    wait_until(residency, lambda: residency.acquire("a") or "write a" in tiers.begun)
    residency.poll()
    assert residency.acquire("a") is None
    assert residency.where("a") == "host"
    assert residency.loading() == ["a"]
    gate.set()
    acquire(residency, "a")
    assert residency.loading() == []


def test_a_slow_version_does_not_delay_another(residency: Residency[Weights], tiers: Tiers) -> None:
    tiers.hold("read slow")
    residency.acquire("slow")
    acquire(residency, "quick")
    assert residency.where("slow") == "disk"


def times_waited() -> int:
    """Number of voluntary context switches of this thread, as counted by Linux; 0 elsewhere."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if sys.platform == "linux" else 0


@pytest.mark.reliability("T46")
def test_polling_and_requests_return_at_once_while_a_read_hangs(residency: Residency[Weights], tiers: Tiers) -> None:
    tiers.hold("read a")
    residency.acquire("a")
    wait_until(residency, lambda: "read a" in tiers.begun)
    before = times_waited()
    for _ in range(100):
        residency.acquire("a")
        residency.poll()
    assert residency.loading() == ["a"] and residency.failure("a") is None  # it hangs still
    assert times_waited() - before < 50


def test_prefetching_stops_at_the_host(residency: Residency[Weights], tiers: Tiers) -> None:
    residency.prefetch("a")
    wait_until(residency, lambda: residency.where("a") == "host")
    for _ in range(5):
        residency.prefetch("a")
        residency.poll()
    assert residency.slots.slots() == []
    assert tiers.reads["a"] == 1


def test_an_idle_version_is_evicted_and_its_eviction_is_reported(residency: Residency[Weights]) -> None:
    for digest in "abc":
        acquire(residency, digest)
        residency.release(digest)
    residency.take_moves()
    acquire(residency, "d")
    assert residency.where("a") == "host"
    assert ("a", "device", "host", "ok") in moves(residency)
    residency.slots.check_integrity({"d": 1})


def test_an_evicted_version_that_the_host_no_longer_holds_went_to_the_disk(
    single: Residency[Weights], tiers: Tiers
) -> None:
    tiers.sizes.update(a=6, b=6)
    acquire(single, "a")
    single.prefetch("b")
    wait_until(single, lambda: single.where("b") == "host")
    single.release("a")
    single.take_moves()
    acquire(single, "b")
    assert single.where("a") == "disk"
    assert ("a", "device", "disk", "ok") in moves(single)


def test_host_evictions_are_reported(residency: Residency[Weights], tiers: Tiers) -> None:
    tiers.sizes.update(a=6, b=6)
    for digest in "ab":
        residency.prefetch(digest)
        wait_until(residency, lambda digest=digest: residency.where(digest) == "host")
    assert residency.where("a") == "disk"
    assert ("a", "host", "disk", "ok") in moves(residency)


def test_while_every_slot_is_in_use_a_version_waits_on_the_host(single: Residency[Weights]) -> None:
    acquire(single, "a")
    assert single.acquire("b") is None
    wait_until(single, lambda: single.where("b") == "host")
    assert single.acquire("b") is None
    assert single.where("a") == "device"
    single.release("a")
    acquire(single, "b")
    assert single.where("a") == "host"


def test_a_version_just_loaded_is_not_evicted_by_another_that_waits(
    single: Residency[Weights],
) -> None:
    """Two sequences request two versions on every step, and there is one slot: the first version is served."""
    order = ["a", "b"]
    for _ in patience("serving both"):
        single.poll()
        if single.acquire(order[0]) is not None:
            single.release(order.pop(0))
        if len(order) == 2:
            assert single.acquire(order[1]) is None
        if not order:
            return
        time.sleep(0.0005)


@pytest.mark.reliability("T42")
def test_a_version_requested_and_given_up_blocks_no_other(single: Residency[Weights]) -> None:
    """A version requested by an aborted sequence does not take the slot of a version in use."""
    acquire(single, "a")
    single.acquire("b")
    wait_until(single, lambda: single.where("b") == "host")
    single.release("a")
    for _ in range(10):
        single.poll()
        time.sleep(0.001)
    assert single.where("a") == "device"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AdapterInvalid([Problem("adapter_model.safetensors", "no file", "a file", "malformed_file")]), "no file"),
        (OSError("disk on fire"), "reading it failed"),
        (MemoryError(), "reading it failed"),
        (KeyError("x"), "reading it failed"),
    ],
)
def test_whatever_a_reader_raises_is_reported(
    residency: Residency[Weights], tiers: Tiers, error: BaseException, reason: str
) -> None:
    tiers.read_errors["a"] = error
    residency.acquire("a")
    wait_until(residency, lambda: residency.failure("a"))
    assert reason in str(residency.failure("a"))
    assert residency.loading() == []
    assert moves(residency) == [("a", "disk", "host", "failed")]
    assert residency.failures().keys() == {"a"}
    residency.slots.check_integrity({})


def test_a_copy_that_fails_gives_its_slot_back(residency: Residency[Weights], tiers: Tiers) -> None:
    tiers.write_errors["a"] = RuntimeError("out of memory")
    wait_until(residency, lambda: residency.acquire("a") or residency.failure("a"))
    assert residency.slots.slots() == []
    assert ("a", "host", "device", "failed") in moves(residency)
    residency.slots.check_integrity({})
    acquire(residency, "b")


def test_a_failed_version_is_tried_again_but_not_at_once(
    residency: Residency[Weights], tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "time", clock := Clock())
    tiers.read_errors["a"] = OSError("not yet")
    residency.acquire("a")
    wait_until(residency, lambda: residency.failure("a"))
    tiers.read_errors.clear()
    residency.expect("a")
    assert residency.acquire("a") is None
    assert residency.failure("a") is not None
    assert tiers.reads["a"] == 1
    clock.now += RETRY_SECONDS + 0.01
    assert residency.acquire("a") is None  # asking alone does not try again: a new request does
    assert tiers.reads["a"] == 1
    residency.expect("a")
    acquire(residency, "a")
    assert residency.failures() == {}


def test_unloading_frees_both_tiers(residency: Residency[Weights]) -> None:
    acquire(residency, "a")
    residency.release("a")
    residency.take_moves()
    residency.unload("a")
    assert residency.where("a") == "disk"
    assert residency.host.digests() == []
    assert moves(residency) == [("a", "device", "disk", "ok")]
    residency.slots.check_integrity({})
    residency.unload("a")  # it is where it should be
    assert residency.take_moves() == []


def test_unloading_is_refused_while_sequences_use_the_version(residency: Residency[Weights]) -> None:
    acquire(residency, "a")
    with pytest.raises(MoveRefused) as refused:
        residency.unload("a")
    assert refused.value.code == "busy"
    assert residency.where("a") == "device"


@pytest.mark.parametrize("stage", ["read a", "write a"])
def test_unloading_is_refused_while_the_version_loads(residency: Residency[Weights], tiers: Tiers, stage: str) -> None:
    gate = tiers.hold(stage)
    residency.acquire("a")
    if stage == "write a":
        wait_until(residency, lambda: residency.acquire("a") or residency.slots.get("a"))
    with pytest.raises(MoveRefused) as refused:
        residency.unload("a")
    assert refused.value.code == "busy"
    gate.set()
    acquire(residency, "a")


def test_unloading_is_refused_while_the_version_is_pinned(residency: Residency[Weights]) -> None:
    """The API unloads by name, and another name may have pinned the same version."""
    acquire(residency, "a")
    residency.release("a")
    residency.pin("a")
    with pytest.raises(MoveRefused) as refused:
        residency.unload("a")
    assert refused.value.code == "busy"
    residency.unpin("a")
    residency.unload("a")


def test_a_pinned_version_stays_and_one_slot_is_left_for_others(residency: Residency[Weights]) -> None:
    for digest in "abc":
        acquire(residency, digest)
        residency.release(digest)
    residency.pin("a")
    residency.pin("b")
    residency.pin("b")  # again is no error and takes no more room
    with pytest.raises(MoveRefused) as refused:
        residency.pin("c")
    assert refused.value.code == "no_room"
    acquire(residency, "d")
    assert {slot.digest for slot in residency.slots.slots()} == {"a", "b", "d"}
    residency.unpin("a")
    assert len(residency.pinned()) == 1
    residency.unpin("never heard of")


def test_what_fits_beside_the_pinned(residency: Residency[Weights]) -> None:
    for digest in ("a", "b"):
        acquire(residency, digest)
        residency.pin(digest)
    assert residency.fit(["c"]) and residency.fit(["a", "c"]) and residency.fit(["a", "b", "c"])
    assert not residency.fit(["c", "d"]) and not residency.fit(["a", "c", "d"])
    residency.unpin("a")
    assert residency.fit(["c", "d"]) and not residency.fit(["c", "d", "e"])


def test_what_fits_by_pages(roomy: Residency[Weights], tiers: Tiers) -> None:
    tiers.sizes.update(wide=5, large=4, small=1)
    assert roomy.fit(["wide", "large"])  # how large they are is not known yet
    acquire(roomy, "wide")
    roomy.prefetch("large")
    wait_until(roomy, lambda: roomy.where("large") == "host")
    assert not roomy.fit(["wide", "large"]) and roomy.fit(["wide", "small"])
    with pytest.raises(MoveRefused) as refused:  # three pages would be left, of the four that the largest takes
        roomy.pin("wide")
    assert refused.value.code == "no_room"
    roomy.release("wide")
    acquire(roomy, "large")
    roomy.pin("large")
    assert roomy.pinned() == {"large": 4}
    assert not roomy.fit(["wide", "small"]) and roomy.fit(["small", "large"])


def test_a_version_that_can_never_fit_is_refused(residency: Residency[Weights], tiers: Tiers) -> None:
    tiers.sizes["huge"] = 9
    residency.acquire("huge")
    wait_until(residency, lambda: residency.failure("huge"))
    assert "9 pages" in str(residency.failure("huge")) and "8" in str(residency.failure("huge"))
    assert residency.host.digests() == [] and residency.where("huge") == "disk"


def test_what_is_beside_the_pages_is_bounded_and_freed(roomy: Residency[Weights], tiers: Tiers) -> None:
    tiers.extras.update(a=60, b=30, c=50, huge=101)
    for digest in "ab":
        acquire(roomy, digest)
        roomy.release(digest)
    assert roomy.slots.extra_bytes == 90
    acquire(roomy, "c")  # pages and slots are free, the bytes are not
    assert roomy.where("a") == "host" and roomy.where("b") == "device"
    roomy.check_integrity({"c": 1}, tiers.kept)
    assert sorted(tiers.kept.values()) == [30, 50]
    roomy.unload("b")
    assert [*tiers.kept.values()] == [50]
    roomy.acquire("huge")
    wait_until(roomy, lambda: roomy.failure("huge"))
    assert "101 bytes" in str(roomy.failure("huge")) and "--adapter-override-bytes" in str(roomy.failure("huge"))


def test_a_version_without_room_beside_the_pinned_ones_is_refused(roomy: Residency[Weights], tiers: Tiers) -> None:
    tiers.extras.update(a=50, b=60, c=40, d=60)
    acquire(roomy, "d")
    with pytest.raises(MoveRefused, match="half"):
        roomy.pin("d")
    roomy.release("d")
    acquire(roomy, "a")
    roomy.pin("a")
    acquire(roomy, "c")
    wait_until(roomy, lambda: roomy.acquire("b") or roomy.failure("b"))
    assert "unpin" in str(roomy.failure("b")) and not roomy.fit(["b", "c"])
    roomy.check_integrity({"a": 1, "c": 1}, tiers.kept)


def test_an_explicit_load_is_repeated_until_it_is_done(residency: Residency[Weights]) -> None:
    for tier in ("host", "device"):
        wait_until(residency, lambda tier=tier: residency.bring("a", tier) or residency.where("a") == tier)
    assert [target for _, _, target, _ in moves(residency)] == ["host", "device"]


def test_an_explicit_load_without_room_is_refused(single: Residency[Weights]) -> None:
    acquire(single, "a")
    with pytest.raises(MoveRefused) as refused:
        wait_until(single, lambda: single.bring("b", "device"))
    assert refused.value.code == "no_room"
    assert single.where("a") == "device"


def test_an_explicit_load_that_fails_says_why_until_another_attempt(
    residency: Residency[Weights], tiers: Tiers
) -> None:
    tiers.read_errors["a"] = OSError("disk on fire")
    with pytest.raises(MoveRefused, match="reading it failed") as refused:
        wait_until(residency, lambda: residency.bring("a", "device"))
    assert refused.value.code == "invalid"
    assert residency.failures() == {"a": str(refused.value)}
    tiers.read_errors.clear()
    residency.forget_failure("a")
    residency.bring("a", "device")
    acquire(residency, "a")


def test_a_failure_can_be_forgotten_at_once_and_this_is_announced(residency: Residency[Weights], tiers: Tiers) -> None:
    """As when the stored files of the version were published again."""
    tiers.read_errors["a"] = OSError("not yet")
    residency.acquire("a")
    wait_until(residency, lambda: residency.failure("a"))
    tiers.read_errors.clear()
    for forget in (residency.forget_failure, residency.unload):
        residency._failed["a"] = ("not yet", 0.0)
        residency.changed = False
        forget("a")
        assert residency.changed and residency.failures() == {}
    residency.changed = False
    residency.forget_failure("a")
    assert not residency.changed
    acquire(residency, "a")


def test_every_change_is_announced(residency: Residency[Weights]) -> None:
    def announced() -> bool:
        changed, residency.changed = residency.changed, False
        return changed

    residency.poll()
    assert not announced()
    residency.prefetch("a")
    assert announced()
    wait_until(residency, lambda: residency.where("a") == "host")
    assert announced()
    acquire(residency, "a")
    assert announced()
    residency.pin("a")
    assert announced()
    residency.unpin("a")
    assert announced()
    residency.release("a")
    residency.unload("a")
    assert announced()


@pytest.mark.reliability("T42")
@pytest.mark.parametrize("seed", range(8))
def test_after_any_operations_the_accounting_is_right_and_nothing_is_stuck(
    residency: Residency[Weights], tiers: Tiers, seed: int
) -> None:
    chance = random.Random(seed)
    digests = "abcdef"
    tiers.sizes.update({digest: chance.randint(1, 3) for digest in digests})
    tiers.extras.update({digest: chance.choice([0, 20, 50]) for digest in digests})
    tiers.read_errors["f"] = OSError("broken")
    references: Counter[str] = Counter()
    for _ in range(300):
        digest = chance.choice(digests)
        action = chance.choice(["acquire", "acquire", "release", "prefetch", "unload", "pin", "unpin", "expect"])
        if action == "acquire" and residency.acquire(digest) is not None:
            references[digest] += 1
            slot = residency.slots.get(digest)
            assert slot is not None and all(tiers.pages[page] == digest for page in slot.pages)
        elif action == "release" and references[digest]:
            residency.release(digest)
            references[digest] -= 1
        elif action == "prefetch":
            residency.prefetch(digest)
        elif action == "expect":
            residency.expect(digest)
        elif action == "unpin":
            residency.unpin(digest)
        elif action in ("unload", "pin") and (action == "unload" or residency.where(digest) == "device"):
            try:
                getattr(residency, action)(digest)
            except MoveRefused as refused:
                assert refused.code == ("busy" if action == "unload" else "no_room")
        residency.poll()
        residency.slots.check_integrity(dict(references))
        residency.check_integrity(dict(references), tiers.kept)
        if chance.random() < 0.2:
            time.sleep(0.001)
    for digest, count in references.items():
        for _ in range(count):
            residency.release(digest)
    for digest in "abcde":
        acquire(residency, digest)
        residency.release(digest)
    assert all(isinstance(move, AdapterMove) for move in residency.take_moves())
    assert "f" not in {slot.digest for slot in residency.slots.slots()}

"""Which sequences run in a step, with how many tokens, and that nobody is left waiting for ever."""

import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from adapters.residency.host_cache import HostCache
from adapters.residency.residency import Residency
from adapters.residency.slots import SlotTable
from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.scheduling.scheduler import PREFETCH_DEPTH, Scheduler
from server.request import SamplingParams, ScaledAdapter
from server.sequence import ScheduledBatch, Sequence, SequenceStatus
from tests.fixtures.timing import patience

BLOCK = 4


@dataclass
class FakeSlots:
    """Slots that fill at the tick after they were asked for, unless a version is held back or broken."""

    num_slots: int = 4
    resident: dict[str, int] = field(default_factory=dict)  # by digest, the references
    held: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)
    prefetched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    indices: dict[str, int] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    promised: set[str] = field(default_factory=set)  # in this step

    def acquire(self, digest: str) -> int | None:
        if digest not in self.resident:
            self.asked.append(digest)
            return None
        self.resident[digest] += 1
        return self.indices[digest]

    def release(self, digest: str) -> None:
        assert self.resident[digest] > 0
        self.resident[digest] -= 1

    def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)

    def where(self, digest: str) -> str:
        return "device" if digest in self.resident else "disk"

    def is_being_read(self, digest: str) -> bool:
        return digest in self.held

    def is_being_copied(self, digest: str) -> bool:
        """Whether the next tick brings it."""
        idle = any(count == 0 and name not in self.pinned for name, count in self.resident.items())
        if digest not in self.asked or digest in self.held or not (idle or len(self.resident) < self.num_slots):
            return False
        self.promised.add(digest)
        return True

    def is_pinned(self, digest: str) -> bool:
        return digest in self.pinned

    def fit(self, digests: Iterable[str]) -> bool:
        return len(list(digests)) <= self.num_slots

    def failure(self, digest: str) -> str | None:
        return self.broken.get(digest)

    def tick(self) -> None:
        """Give requested versions, the earliest first, a free slot or that of an idle version."""
        self.promised.clear()
        for digest in self.asked:
            if digest in self.held or digest in self.resident:
                continue
            idle = [name for name, count in self.resident.items() if count == 0 and name not in self.pinned]
            if len(self.resident) >= self.num_slots and idle:
                del self.resident[idle[0]], self.indices[idle[0]]
            if len(self.resident) < self.num_slots:
                self.resident[digest] = 0
                self.indices[digest] = min(set(range(self.num_slots)) - set(self.indices.values()))
        self.asked.clear()


def make_scheduler(num_blocks: int = 100, slots: FakeSlots | None = None, **limits: int) -> Scheduler:
    settings = {"max_num_seqs": 8, "max_batch_tokens": 16, "max_wait_steps": 5, **limits}
    return Scheduler(BlockManager(num_blocks, BLOCK), slots or FakeSlots(), **settings)


def taking(*adapters: str | None) -> tuple[ScaledAdapter, ...]:
    return tuple(ScaledAdapter(adapter) for adapter in adapters if adapter is not None)


def make_seq(name: str, num_tokens: int, *adapters: str | None, max_tokens: int = 4) -> Sequence:
    # Prompts differ from their first token on, so that nothing is found in the prefix cache by chance.
    prompt = [int.from_bytes(name.encode(), "big") % 10_007, *range(1, num_tokens)]
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens), taking(*adapters))


def next_token(seq: Sequence) -> int:
    """The model: a function of all tokens so far and of the adapter."""
    return zlib.crc32(repr((seq.token_ids, seq.adapters)).encode()) % 1000


def run_step(scheduler: Scheduler) -> ScheduledBatch:
    """One step as the engine does it: schedule, compute, sample, finish."""
    if isinstance(scheduler.adapters, FakeSlots):
        scheduler.adapters.tick()
    batch = scheduler.schedule()
    assert len({id(scheduled.seq) for scheduled in batch.sequences}) == len(batch.sequences), "one is in it twice"
    assert batch.num_tokens <= scheduler.max_batch_tokens
    for scheduled in batch.sequences:
        seq, samples, end = scheduled.seq, scheduled.samples, scheduled.end
        assert len(seq.block_table) * BLOCK >= end, "the step's tokens have no place to go"
        scheduler.blocks.commit(seq, end)
        if samples:
            scheduler.blocks.verify(seq, end)
            seq.token_ids.append(next_token(seq))
            if seq.num_output_tokens >= seq.sampling.max_tokens:
                scheduler.finish(seq)
    check(scheduler)
    return batch


def check(scheduler: Scheduler) -> None:
    """Blocks and adapter slots are held exactly by what runs."""
    scheduler.blocks.check_integrity(scheduler.running)
    assert all(seq.status is SequenceStatus.RUNNING for seq in scheduler.running)
    assert all(seq.status is SequenceStatus.WAITING for seq in scheduler.waiting)
    assert all(not seq.block_table and not seq.slots for seq in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    if isinstance(scheduler.adapters, FakeSlots):
        for digest, references in scheduler.adapters.resident.items():
            users = [seq for seq in scheduler.running if ScaledAdapter(digest) in seq.adapters]
            assert references == sum(bool(seq.slots) for seq in users)


def shares(batch: ScheduledBatch) -> dict[str, int]:
    return {scheduled.seq.seq_id: scheduled.num_new_tokens for scheduled in batch.sequences}


def run_to_end(scheduler: Scheduler, max_steps: int = 2000) -> int:
    for steps in range(max_steps):
        if not (scheduler.waiting or scheduler.running):
            return steps
        run_step(scheduler)
    raise AssertionError("the scheduler does not come to an end")


def test_the_token_budget_is_shared_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_seq(name, 7))
    assert shares(run_step(scheduler)) == {"a": 7, "b": 7, "c": 2}


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_at_its_end() -> None:
    scheduler = make_scheduler()
    seq = make_seq("a", 40)
    scheduler.add(seq)
    assert [shares(run_step(scheduler))["a"] for _ in range(3)] == [16, 16, 8]
    assert seq.num_output_tokens == 1


def test_a_prefill_does_not_hold_up_those_that_decode() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq("a", 4, max_tokens=9))
    run_step(scheduler)
    scheduler.add(make_seq("b", 40))
    assert shares(run_step(scheduler)) == {"a": 1, "b": 15}
    assert shares(run_step(scheduler)) == {"a": 1, "b": 15}
    assert shares(run_step(scheduler)) == {"a": 1, "b": 10}
    assert shares(run_step(scheduler)) == {"a": 1, "b": 1}


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_seq(name, 2))
    assert set(shares(run_step(scheduler))) == {"a", "b"}


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq("a", 9, max_tokens=1))
    run_step(scheduler)
    scheduler.add(make_seq("a", 9, max_tokens=1))
    assert shares(run_step(scheduler)) == {"a": 1}


def burst(size: int, prefix: int, own: int, *adapters: str) -> list[Sequence]:
    """Sequences that begin with the same tokens and end with different ones."""
    params = SamplingParams(max_tokens=4)
    prompts = [[*range(1000, 1000 + prefix), *([2000 + n] * own)] for n in range(size)]
    return [Sequence(f"b{n}", prompt, params, taking(*adapters)) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize("adapters", [(), ("x",)])
@pytest.mark.parametrize(("budget", "own"), [(16, 1), (16, 5), (100, 1), (100, 5)])
def test_a_prompt_that_several_begin_with_is_computed_once(budget: int, own: int, adapters: tuple[str, ...]) -> None:
    """In one step or in several; the others come in right behind, each with its own end."""
    scheduler = make_scheduler(max_batch_tokens=budget)
    seqs = burst(6, 40, own, *adapters)
    for seq in seqs:
        scheduler.add(seq)
    computed = 0
    while scheduler.waiting or scheduler.running:
        batch = run_step(scheduler)
        computed += sum(min(s.end, s.seq.num_prompt_tokens) - s.start for s in batch.sequences if s.start < 40 + own)
    assert computed == 40 + 6 * own
    for seq in seqs:
        alone = Sequence("alone", seq.token_ids[: seq.num_prompt_tokens], seq.sampling, seq.adapters)
        while alone.num_output_tokens < 4:
            alone.token_ids.append(next_token(alone))
        assert seq.token_ids == alone.token_ids


def test_a_short_common_beginning_is_not_waited_for() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    for seq in burst(2, 8, 12):
        scheduler.add(seq)
    assert len(shares(run_step(scheduler))) == 2


def test_who_waits_for_a_common_beginning_keeps_its_place() -> None:
    scheduler = make_scheduler(max_batch_tokens=100, max_num_seqs=3)
    for seq in burst(2, 40, 1):
        scheduler.add(seq)
    for name in "xyz":
        scheduler.add(make_seq(name, 2, max_tokens=50))
    assert shares(run_step(scheduler)) == {"b0": 41, "x": 2}
    assert shares(run_step(scheduler)) == {"b0": 1, "x": 1, "b1": 1}


@pytest.mark.parametrize("how", ["abort", "preemption"])
def test_when_the_first_of_a_burst_goes_the_next_computes_what_is_common(how: str) -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    first, *others = burst(3, 40, 1)
    for seq in (first, *others):
        scheduler.add(seq)
    assert shares(run_step(scheduler)) == {"b0": 16}
    if how == "abort":
        scheduler.finish(first)
        assert shares(run_step(scheduler)) == {"b1": 16}
    else:
        scheduler.requeue(first)
        assert shares(run_step(scheduler)) == {"b0": 16}
    run_to_end(scheduler)
    assert all(seq.status is SequenceStatus.FINISHED for seq in (first, *others))


@pytest.mark.parametrize("how", ["abort", "preemption"])
def test_a_prefill_that_is_broken_off_leaves_the_prefix_that_it_found(how: str) -> None:
    scheduler = make_scheduler()
    first, broken, last = burst(3, 40, 1)
    scheduler.add(first)
    run_to_end(scheduler)
    broken.token_ids += [7] * 60
    scheduler.add(broken)
    run_step(scheduler)
    assert 40 < broken.num_computed_tokens < broken.num_tokens
    (scheduler.finish if how == "abort" else scheduler.requeue)(broken)
    assert len(scheduler.take_suspect_blocks()) == 4  # its own, of this step
    if how == "abort":
        scheduler.add(last)
        assert shares(run_step(scheduler)) == {"b2": 1}
    else:
        assert shares(run_step(scheduler)) == {"b1": 16}


def test_memory_is_handed_out_in_order_of_arrival() -> None:
    """A small request does not slip past a large one that waits for memory."""
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_seq("running", 8, max_tokens=3))
    run_step(scheduler)
    scheduler.add(make_seq("large", 20))
    scheduler.add(make_seq("small", 2))
    while "large" not in shares(batch := run_step(scheduler)):
        assert "small" not in shares(batch)
    assert scheduler.preemptions == 0


def test_the_newest_is_preempted_and_comes_to_the_same_answer() -> None:
    alone = {}
    for name in "abc":
        scheduler = make_scheduler()
        scheduler.add(seq := make_seq(name, 6, max_tokens=14))
        run_to_end(scheduler)
        alone[name] = seq.token_ids
    scheduler = make_scheduler(num_blocks=8)
    seqs = {name: make_seq(name, 6, max_tokens=14) for name in "abc"}
    for seq in seqs.values():
        scheduler.add(seq)
    while scheduler.preemptions == 0:
        run_step(scheduler)
    assert seqs["c"] in scheduler.waiting
    assert scheduler.running[0] is seqs["a"]
    run_to_end(scheduler)
    assert {name: seq.token_ids for name, seq in seqs.items()} == alone


def test_the_oldest_is_never_preempted() -> None:
    scheduler = make_scheduler(num_blocks=7, max_batch_tokens=64)
    oldest = make_seq("oldest", 4, max_tokens=24)
    scheduler.add(oldest)
    for name in "bcd":
        scheduler.add(make_seq(name, 4, max_tokens=20))
    while oldest.status is not SequenceStatus.FINISHED:
        assert "oldest" in shares(run_step(scheduler))
    assert scheduler.preemptions > 0


def test_preempted_sequences_go_first_again_in_their_order() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=64)
    seqs = [make_seq(name, 4, max_tokens=12) for name in "abc"]
    for seq in seqs:
        scheduler.add(seq)
    run_step(scheduler)
    scheduler.add(make_seq("late", 4))
    while len(scheduler.running) > 1:
        run_step(scheduler)
    assert [seq.seq_id for seq in scheduler.waiting] == ["b", "c", "late"]


def test_a_sequence_whose_adapter_is_on_its_way_is_passed_over() -> None:
    slots = FakeSlots(held={"slow"})
    scheduler = make_scheduler(slots=slots)
    scheduler.add(make_seq("first", 2, "slow"))
    scheduler.add(make_seq("second", 2))
    assert shares(run_step(scheduler)) == {"second": 2}
    slots.held.clear()
    assert shares(run_step(scheduler)) == {"second": 1, "first": 2}
    assert not scheduler.waiting


def test_passing_over_keeps_the_order_of_arrival() -> None:
    slots = FakeSlots(held={"slow"})
    scheduler = make_scheduler(slots=slots, max_num_seqs=1)
    for name, adapter in (("a", "slow"), ("b", None), ("c", "slow"), ("d", None)):
        scheduler.add(make_seq(name, 2, adapter))
    run_step(scheduler)
    assert [seq.seq_id for seq in scheduler.waiting] == ["a", "c", "d"]


def test_adapters_of_those_behind_are_fetched_ahead_of_their_turn() -> None:
    slots = FakeSlots()
    scheduler = make_scheduler(slots=slots, max_num_seqs=1)
    for name, adapter in (("a", None), ("b", "soon"), ("c", None), ("d", "later")):
        scheduler.add(make_seq(name, 2, adapter))
    run_step(scheduler)
    assert slots.prefetched == ["soon", "later"]


def test_only_the_first_of_a_long_queue_ask_for_their_adapters() -> None:
    """Were all of them read, the host cache would drop the first ones' before they had their turn."""
    slots = FakeSlots(held={f"cold{n}" for n in range(PREFETCH_DEPTH + 5)}, resident={"warm": 0}, indices={"warm": 0})
    scheduler = make_scheduler(slots=slots)
    for n in range(PREFETCH_DEPTH + 5):
        scheduler.add(make_seq(f"s{n}", 2, f"cold{n}"))
    scheduler.add(make_seq("last", 2, "warm"))
    assert shares(run_step(scheduler)) == {"last": 2}
    assert slots.asked == [f"cold{n}" for n in range(PREFETCH_DEPTH)]
    assert len(scheduler.waiting) == PREFETCH_DEPTH + 5


def test_nothing_stays_taken_when_an_adapter_is_there_but_memory_is_not() -> None:
    slots = FakeSlots()
    scheduler = make_scheduler(num_blocks=3, slots=slots)
    scheduler.add(make_seq("running", 8, max_tokens=3))
    run_step(scheduler)
    scheduler.add(make_seq("waits", 8, "x"))
    run_step(scheduler)
    run_step(scheduler)  # `check` finds a reference on "x" here if one was left
    assert slots.resident == {"x": 0}
    run_to_end(scheduler)


@pytest.mark.reliability("T44")
@pytest.mark.parametrize("bound", [1, 5, 20])
def test_a_cold_adapter_is_admitted_within_the_bound(bound: int) -> None:
    """One slot, a stream of requests for A that never ends, and one for B."""
    scheduler = make_scheduler(slots=FakeSlots(num_slots=1), max_wait_steps=bound)
    cold = make_seq("b", 2, "B")
    for step in range(5):
        scheduler.add(make_seq(f"warm{step}", 2, "A", max_tokens=3))
        run_step(scheduler)
    scheduler.add(cold)
    waited = 0
    while cold.status is SequenceStatus.WAITING:
        scheduler.add(make_seq(f"a{waited}", 2, "A", max_tokens=3))
        run_step(scheduler)
        waited += 1
        assert waited <= bound + 3 + 2  # what still runs ends in three steps, the copy takes one
    assert waited > bound


def test_before_the_bound_others_may_still_pass() -> None:
    """The slow one waits for the only slot, which an earlier sequence keeps and later ones share."""
    scheduler = make_scheduler(slots=FakeSlots(num_slots=1), max_wait_steps=3)
    scheduler.add(make_seq("holder", 2, "warm", max_tokens=20))
    run_step(scheduler), run_step(scheduler)
    scheduler.add(slow := make_seq("slow", 2, "slow"))
    for step in range(6):
        scheduler.add(make_seq(f"s{step}", 2, "warm", max_tokens=1))
        passed = f"s{step}" in shares(run_step(scheduler))
        assert passed == (step < 4)
        assert slow.waited_steps == min(step, 4)


@pytest.mark.parametrize("held", [{"slow"}, set()])
def test_base_and_pinned_sequences_pass_whoever_waits_for_an_adapter(held: set[str]) -> None:
    """They take no slot that it could have, whether it waits for its load or for the only slot that is not pinned."""
    slots = FakeSlots(num_slots=2, held=held, pinned={"pinned"})
    scheduler = make_scheduler(slots=slots, max_wait_steps=3)
    for name, adapter in (("a", "pinned"), ("b", "warm")):
        scheduler.add(make_seq(name, 2, adapter, max_tokens=90))
    run_step(scheduler), run_step(scheduler)
    scheduler.add(slow := make_seq("slow", 2, "slow"))
    for step in range(20):
        scheduler.add(make_seq(f"base{step}", 2, max_tokens=1))
        scheduler.add(make_seq(f"pin{step}", 2, "pinned", max_tokens=1))
        scheduler.add(make_seq(f"warm{step}", 2, "warm", max_tokens=1))
        passed = set(shares(run_step(scheduler)))
        assert {f"base{step}", f"pin{step}"} <= passed
        assert (f"warm{step}" in passed) == (bool(held) or step < 4)
    assert slow.overdue == (not held)
    assert slow.status is SequenceStatus.WAITING


def test_nobody_ages_while_nothing_runs() -> None:
    scheduler = make_scheduler(slots=FakeSlots(held={"slow"}), max_wait_steps=3)
    scheduler.add(slow := make_seq("slow", 2, "slow"))
    for _ in range(1000):
        assert not run_step(scheduler)
    assert slow.waited_steps == 0
    scheduler.add(make_seq("base", 2))
    assert shares(run_step(scheduler)) == {"base": 2}


@pytest.mark.parametrize("in_memory", [True, False])
def test_who_waits_for_a_slot_ages_while_it_is_read_again(in_memory: bool) -> None:
    """Its first read is nobody's fault; later ones are, because others took its place in host memory."""
    slots = FakeSlots(num_slots=1, held={"cold"})
    scheduler = make_scheduler(slots=slots, max_wait_steps=3)
    scheduler.add(make_seq("holder", 2, "warm", max_tokens=90))
    run_step(scheduler), run_step(scheduler)
    scheduler.add(cold := make_seq("cold", 2, "cold"))
    for step in range(20):
        if step >= 10:
            slots.held = set() if in_memory or step % 2 == 0 else {"cold"}
        scheduler.add(make_seq(f"warm{step}", 2, "warm", max_tokens=1))
        passed = f"warm{step}" in shares(run_step(scheduler))
        assert passed == (step < 13)
    assert cold.overdue


def test_the_batch_is_ordered_by_slot_with_the_base_first() -> None:
    slots = FakeSlots()
    scheduler = make_scheduler(slots=slots)
    adapters = ["x", None, "y", "x", None, "z"]
    for index, adapter in enumerate(adapters):
        scheduler.add(make_seq(f"s{index}", 2, adapter))
    run_step(scheduler)
    batch = run_step(scheduler)
    order = [scheduled.seq.adapters for scheduled in batch.sequences]
    assert order == [taking(name) for name in (None, None, "x", "x", "y", "z")]
    assert batch.num_adapters == 3


def test_a_composition_runs_when_all_its_adapters_are_there() -> None:
    slots = FakeSlots(held={"slow"})
    scheduler = make_scheduler(slots=slots)
    scheduler.add(seq := make_seq("both", 2, "x", "slow"))
    for _ in range(3):
        assert not run_step(scheduler)  # `check` finds a reference on "x" here if one was left
    slots.held.clear()
    batch = run_step(scheduler)
    assert shares(batch) == {"both": 2} and batch.num_adapters == 2
    assert seq.slots == (slots.indices["x"], slots.indices["slow"])
    run_to_end(scheduler)


def test_all_adapters_of_a_composition_are_fetched_ahead() -> None:
    slots = FakeSlots()
    scheduler = make_scheduler(slots=slots, max_num_seqs=1)
    for name, adapters in (("a", ()), ("b", ("x", "y"))):
        scheduler.add(make_seq(name, 2, *adapters))
    run_step(scheduler)
    assert slots.prefetched == ["x", "y"]


def test_a_composition_ends_with_any_of_its_adapters_and_when_there_is_no_room_for_all() -> None:
    slots = FakeSlots(num_slots=2, broken={"bad": "no file"}, held={"bad"})
    scheduler = make_scheduler(slots=slots)
    scheduler.add(bad := make_seq("bad", 2, "x", "bad"))
    scheduler.add(large := make_seq("large", 2, "x", "y", "z"))
    scheduler.add(make_seq("good", 2, "x", "y"))
    reasons = dict(scheduler.failed())
    assert reasons[bad] == "no file" and "do not fit" in reasons[large] and len(reasons) == 2


@dataclass(frozen=True)
class Weights:
    num_pages: int = 1
    nbytes: int = 1
    extra_bytes: int = 0


@pytest.fixture
def residency() -> Iterator[Residency[Weights]]:
    """The real one: two slots, host memory for a single adapter, copies that take a moment."""
    made = Residency(SlotTable(2, 2), HostCache(1), lambda _: Weights(), lambda *_: time.sleep(0.0005))
    yield made
    made.close()


def steps_to(scheduler: Scheduler, residency: Residency[Weights], condition: Callable[[], bool]) -> None:
    """Step until `condition`; steps in which nothing can run wait for a reader thread."""
    for _ in patience("the end of waiting"):
        if condition():
            return
        residency.poll()
        if not run_step(scheduler):
            time.sleep(0.0005)
        counts = Counter(adapter.digest for seq in scheduler.running for adapter in seq.adapters)
        residency.slots.check_integrity(counts)


def bring(residency: Residency[Weights], *digests: str) -> None:
    """Wait until these are on the device, in this order of use."""
    for digest in digests:
        for _ in patience(f"the arrival of {digest}"):
            if residency.where(digest) == "device":
                break
            residency.request(digest)
            residency.poll()
            time.sleep(0.0005)


@pytest.mark.parametrize(
    "pairs", [("xy", "zw"), ("xy", "yz"), ("xy", "yx"), ("xy", "yz", "zx"), ("xy", "z", "yw", "x", "wz")]
)
def test_compositions_that_want_each_other_s_slots_all_end(residency: Residency[Weights], pairs: tuple[str]) -> None:
    scheduler = Scheduler(BlockManager(100, BLOCK), residency, 8, 64, max_wait_steps=1000)
    for index, pair in enumerate(pairs * 3):
        scheduler.add(make_seq(f"s{index}", 3, *pair))
    steps_to(scheduler, residency, lambda: not (scheduler.waiting or scheduler.running))


def test_a_composition_is_admitted_within_the_bound(residency: Residency[Weights]) -> None:
    """Two adapters hold the slots, and others that want the same two pass while they may."""
    bound = 10
    scheduler = Scheduler(BlockManager(1000, BLOCK), residency, 8, 64, max_wait_steps=bound)
    holders = [make_seq(name, 2, name, max_tokens=100) for name in "xy"]
    bring(residency, "x", "y")
    for seq in holders:
        scheduler.add(seq)
    run_step(scheduler)
    assert len(scheduler.running) == 2
    scheduler.add(pair := make_seq("pair", 2, "z", "w"))
    while pair.waited_steps <= bound:
        residency.poll()
        scheduler.add(short := make_seq(f"{pair.waited_steps}", 2, "xy"[pair.waited_steps % 2], max_tokens=1))
        run_step(scheduler)
        assert (short.status is SequenceStatus.FINISHED) == (pair.waited_steps <= bound)
    scheduler.add(late := make_seq("late", 2, "x"))
    steps_to(scheduler, residency, lambda: pair.status is not SequenceStatus.WAITING)
    assert late.status is SequenceStatus.WAITING
    assert all(seq.status is SequenceStatus.FINISHED for seq in holders)
    steps_to(scheduler, residency, lambda: not (scheduler.waiting or scheduler.running))


def test_a_composition_keeps_what_it_has_from_those_behind(residency: Residency[Weights]) -> None:
    """Its first adapter is there and idle; neither its own second nor a later sequence's adapter takes that slot."""
    scheduler = Scheduler(BlockManager(100, BLOCK), residency, 8, 64, max_wait_steps=1000)
    bring(residency, "x", "z")
    scheduler.add(pair := make_seq("pair", 2, "y", "x"))
    scheduler.add(make_seq("late", 2, "w"))
    residency.take_moves()
    steps_to(scheduler, residency, lambda: pair.status is not SequenceStatus.WAITING)
    assert "x" not in {move.digest for move in residency.take_moves()}
    steps_to(scheduler, residency, lambda: not (scheduler.waiting or scheduler.running))


def test_sequences_of_a_broken_adapter_are_reported_with_the_reason() -> None:
    slots = FakeSlots(broken={"bad": "no file"}, held={"bad"})
    scheduler = make_scheduler(slots=slots)
    scheduler.add(bad := make_seq("bad", 2, "bad"))
    scheduler.add(make_seq("good", 2))
    assert scheduler.failed() == [(bad, "no file")]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted", "waiting for an adapter"])
def test_a_sequence_can_be_taken_out_in_any_state(state: str) -> None:
    slots = FakeSlots(held={"slow"})
    scheduler = make_scheduler(num_blocks=12, slots=slots)
    seq = make_seq("s", 40 if state == "prefilling" else 6, "slow" if "adapter" in state else "x", max_tokens=30)
    other = make_seq("other", 4, max_tokens=40)
    if state == "preempted":
        scheduler.add(other)
    scheduler.add(seq)
    if state != "waiting":
        run_step(scheduler)
        run_step(scheduler)
    while state == "preempted" and not scheduler.preemptions:
        run_step(scheduler)
    running = {"prefilling": 1, "decoding": 1, "preempted": 1}.get(state, 0)
    assert len(scheduler.running) == running
    assert seq.status is (SequenceStatus.RUNNING if state in ("prefilling", "decoding") else SequenceStatus.WAITING)
    if state == "prefilling":
        assert 0 < seq.num_computed_tokens < seq.num_prompt_tokens
    scheduler.finish(seq)
    assert seq.status is SequenceStatus.FINISHED
    if state == "preempted":
        scheduler.finish(other)
    check(scheduler)
    assert not (scheduler.waiting or scheduler.running)
    assert scheduler.blocks.num_used == 0
    assert not any(slots.resident.values())


@pytest.mark.parametrize("seed", range(25))
def test_whatever_comes_the_books_balance_and_everything_ends_as_it_would_alone(seed: int) -> None:
    """Random arrivals, adapters, lengths and aborts over little memory and few slots."""
    chance = random.Random(seed)
    slots = FakeSlots(num_slots=chance.choice([1, 2, 3]))
    scheduler = make_scheduler(
        num_blocks=12,
        slots=slots,
        max_num_seqs=chance.choice([2, 4]),
        max_batch_tokens=chance.choice([16, 40]),
        max_wait_steps=chance.choice([1, 4, 50]),
    )
    seqs: list[Sequence] = []
    for step in range(60):
        if chance.random() < 0.5:
            adapters = chance.sample(["x", "y", "z"], chance.randint(0, slots.num_slots))
            max_tokens = chance.randint(1, 20)
            seqs.append(make_seq(f"s{step % 7}", chance.randint(1, 24), *adapters, max_tokens=max_tokens))
            if chance.random() < 0.4:  # many begin alike
                prompt = seqs[-1].token_ids
                prompt[:] = [*range(100, 100 + chance.randint(1, 20)), *prompt][: len(prompt)]
            scheduler.add(seqs[-1])
        alive = [seq for seq in seqs if seq.status is not SequenceStatus.FINISHED]
        if alive and chance.random() < 0.1:
            aborted = chance.choice(alive)
            seqs.remove(aborted)
            scheduler.finish(aborted)
        run_step(scheduler)
    run_to_end(scheduler)
    assert scheduler.blocks.num_used == 0
    for seq in seqs:
        alone = Sequence("alone", seq.token_ids[: seq.num_prompt_tokens], seq.sampling, seq.adapters)
        while alone.num_output_tokens < seq.sampling.max_tokens:
            alone.token_ids.append(next_token(alone))
        assert seq.token_ids == alone.token_ids

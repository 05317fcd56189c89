"""Merges, submissions, aborts and new versions in any order: nobody waits for ever, and everything is answered."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from adapters.errors import MoveRefused
from server.ipc.messages import Merge
from server.sequence import Sequence, SequenceStatus
from tests.test_merging import FakeMerged, World
from tests.test_scheduler import make_seq

VERSIONS = [None, "a", "b"]
SETTLED = 300  # steps after which everything that can end has ended


class Refusing(FakeMerged):
    """Merged weights that the device may have no memory for."""

    def install(self) -> None:
        if self.broken:
            raise MoveRefused("no_room", "no memory")
        assert self.installed == 0
        self.installed += 1

    def restore(self) -> None:
        assert self.installed == 1
        self.installed -= 1


class MergeMachine(RuleBasedStateMachine):
    """The engine's books between messages and steps, without a model."""

    gives_way = True

    def __init__(self) -> None:
        super().__init__()
        self.world = World(gives_way=self.gives_way, auto=True, weights=Refusing())
        self.world.scheduler.max_wait_steps, self.world.scheduler.max_num_seqs = 3, 2
        self.sequences: list[Sequence] = []
        self.refused: list[Sequence] = []
        self.requests = 0
        self.replies: list[int] = []

    @rule(version=st.sampled_from(VERSIONS), max_tokens=st.integers(1, 8), tenant=st.sampled_from(["", "t"]))
    def submit(self, version: str | None, max_tokens: int, tenant: str) -> None:
        seq = make_seq(f"s{len(self.sequences)}", 5, version, max_tokens=max_tokens)
        seq.cache_salt = tenant
        self.world.clock.now += 0.5
        seq.arrival = self.world.clock.now
        self.world.merging.arrived(seq.sole_adapter)
        self.world.scheduler.add(seq)
        self.sequences.append(seq)

    @rule(chosen=st.integers(0, 99))
    def abort(self, chosen: int) -> None:
        live = [seq for seq in self.sequences if seq.status is not SequenceStatus.FINISHED]
        if live:
            self.world.scheduler.finish(live[chosen % len(live)])

    @rule(version=st.sampled_from(VERSIONS[1:]), drain=st.booleans(), steps=st.sampled_from([0, 0, 20]))
    def merge(self, version: str, drain: bool, steps: int) -> None:
        """Ask for a merge; with `steps`, its weights are there at once, so that it is often complete then."""
        self.requests += 1
        self.world.merging.merge(Merge(self.requests, version, drain=drain))
        if steps and self.world.futures and not self.world.futures[-1].done():
            self.computed("ready", broken=False)
        self.step(steps)

    @rule()
    def unmerge(self) -> None:
        self.requests += 1
        self.world.merging.unmerge(self.requests)

    @rule(version=st.sampled_from(VERSIONS[1:]))
    def publish(self, version: str) -> None:
        """Another version takes the name, and the old one is retired."""
        self.world.merging.leave("retired", version)

    @rule(outcome=st.sampled_from(["ready", "refused", "raises"]), broken=st.booleans())
    @precondition(lambda self: any(not future.done() for future in self.world.futures))
    def computed(self, outcome: str, broken: bool) -> None:
        """The thread that computes the merged weights ends."""
        future = self.world.futures[-1]
        if future.done():
            return
        if outcome == "ready":
            self.world.weights.broken = broken and not self.world.weights.installed
            future.set_result(self.world.weights)
        else:
            future.set_exception(MoveRefused("no_room", "large") if outcome == "refused" else RuntimeError("a bug"))

    @rule(version=st.sampled_from(VERSIONS[1:]), fails=st.booleans())
    def break_adapter(self, version: str, fails: bool) -> None:
        """A version is evicted and cannot be loaded any more, or can be again."""
        slots = self.world.slots
        if not fails:
            slots.broken.pop(version, None)
            slots.held.discard(version)
        elif not slots.resident.get(version):
            slots.resident.pop(version, None)
            slots.indices.pop(version, None)
            slots.broken[version] = "the file is gone"
            slots.held.add(version)

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.clock.now += 0.1
            self.world.step()
            self.end([seq for seq, _ in self.world.scheduler.failed()])
            refused = self.world.merging.refused()
            self.refused += refused
            self.end(refused)
            self.replies += [reply.request_id for reply in self.world.merging.take_replies()]
            self.check_weights()

    def end(self, found: list[Sequence]) -> None:
        for seq in found:
            self.world.scheduler.finish(seq)

    def check_weights(self) -> None:
        """Whatever runs runs with its own weights."""
        merged = self.world.scheduler.gate.owner if self.world.weights.installed else None
        assert self.world.scheduler.gate.merged == bool(merged)
        for seq in self.world.scheduler.running:
            assert merged is None or seq.sole_adapter == merged

    @rule()
    def settle(self) -> None:
        """From any state, all sequences end and all requests are answered."""
        for _ in range(SETTLED):
            if self.world.futures and not self.world.futures[-1].done():
                self.world.futures[-1].set_result(self.world.weights)
            self.step(1)
        assert not (self.world.scheduler.waiting or self.world.scheduler.running), self.world.merging.status
        assert self.world.merging.status.state in ("none", "merged")
        assert sorted(self.replies) == list(range(1, self.requests + 1))
        assert not (self.gives_way and self.refused)

    def teardown(self) -> None:
        self.settle()


class RefusingMachine(MergeMachine):
    gives_way = False


limits = settings(max_examples=50, stateful_step_count=30)
MergeMachine.TestCase.settings = RefusingMachine.TestCase.settings = limits
TestWhereMergesGiveWay = MergeMachine.TestCase
TestWhereMergesRefuseOthers = RefusingMachine.TestCase


def test_who_passed_the_api_before_a_merge_is_answered_and_holds_back_nobody() -> None:
    """The race of a request that was resolved before the merge and submitted after it."""
    machine: Any = RefusingMachine()
    machine.merge("a", drain=True, steps=0)
    machine.computed("ready", broken=False)
    machine.step(2)
    assert machine.world.state == "merged"
    machine.submit(None, 4, "")
    for _ in range(60):
        machine.submit("a", 1, "")
        machine.step(2)
    assert machine.refused == machine.sequences[:1]
    assert len(machine.world.scheduler.waiting) <= 1


@pytest.mark.parametrize("gives_way", [True, False])
def test_who_came_with_a_merge_that_makes_another_stay_is_answered(gives_way: bool) -> None:
    """The policy merged it, a request for the base model waits, and an operator asks for the merge as well."""
    world = World(gives_way=gives_way, auto=True)
    for _ in range(20):
        world.add(f"p{world.clock.now}", "a", 1)
        world.step(2)
    world.ready()
    assert world.merging.status.asked_by == "policy" and world.state == "merged"
    base = world.add("base", None)
    world.merging.merge(Merge(9, "a"))
    world.merging.advance()
    assert world.merging.refused() == ([] if gives_way else [base])

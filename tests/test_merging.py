"""When a version is merged and when it comes out again: the books alone, with weights and a clock that are made up."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from adapters.errors import AdapterInvalid, MoveRefused, Problem
from server.engine.faults import EngineBroken
from server.engine.merging import Merged, MergePolicy, Merging
from server.engine.scheduling.merge_gate import MergeGate
from server.ipc.messages import Merge
from server.request import ScaledAdapter
from server.sequence import Sequence
from tests.test_scheduler import FakeSlots, make_scheduler, make_seq, run_step


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeMerged:
    requantized: bool = False
    installed: int = 0
    broken: bool = False

    def install(self) -> None:
        if self.broken:
            raise MoveRefused("no_room", "no memory")
        self.installed += 1

    def restore(self) -> None:
        self.installed -= 1


@dataclass
class World:
    """A scheduler and its merging, one step at a time."""

    gives_way: bool = True
    auto: bool = False
    clock: Clock = field(default_factory=Clock)
    weights: FakeMerged = field(default_factory=FakeMerged)

    def __post_init__(self) -> None:
        self.slots = FakeSlots()
        self.scheduler = make_scheduler(slots=self.slots)
        self.futures: list[Future[Merged]] = []
        self.asked: list[tuple[str, bool]] = []
        policy = MergePolicy(10, 3, 60, self.clock) if self.auto else None
        self.merging = Merging(self.scheduler, self._prepare, self.gives_way, policy, self.clock)

    def _prepare(self, digest: str, allow_requantize: bool) -> "Future[Merged]":
        self.asked.append((digest, allow_requantize))
        self.futures.append(Future())
        return self.futures[-1]

    def add(self, name: str, adapter: str | None, max_tokens: int = 4) -> Sequence:
        seq = make_seq(name, 5, adapter, max_tokens=max_tokens)
        self.clock.now += 1
        seq.arrival = self.clock.now
        self.merging.arrived(adapter)
        self.scheduler.add(seq)
        return seq

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.merging.advance()
            run_step(self.scheduler)

    def ready(self) -> None:
        self.futures[-1].set_result(self.weights)
        self.step()

    @property
    def state(self) -> str:
        return self.merging.status.state

    def replies(self) -> list[tuple[int, str | None]]:
        return [(reply.request_id, reply.error and reply.error[0]) for reply in self.merging.take_replies()]

    def switches(self) -> list[tuple[str, str]]:
        return [(switch.direction, switch.reason) for switch in self.merging.take_switches()]


def merged_world(**options: bool) -> World:
    world = World(**options)
    world.merging.merge(Merge(1, "a"))
    world.ready()
    assert world.replies() == [(1, None)] and world.weights.installed == 1
    return world


def test_an_idle_engine_merges_as_soon_as_the_weights_are_there() -> None:
    world = World()
    world.merging.merge(Merge(1, "a", allow_requantize=True))
    assert world.asked == [("a", True)] and world.merging.has_work()
    world.step(3)
    assert world.state == "preparing" and world.replies() == []
    world.ready()
    assert world.state == "merged" and world.replies() == [(1, None)] and world.switches() == [("merge", "request")]
    assert world.merging.changed


def test_what_runs_lets_go_of_its_slots_and_takes_them_again() -> None:
    world = World()
    own = [world.add(f"own{i}", "a", 50) for i in range(3)]
    world.step(2)
    assert world.slots.resident["a"] == 3
    world.merging.merge(Merge(1, "a"))
    world.ready()
    assert {seq.slots for seq in own} == {()} and world.slots.resident["a"] == 0
    own.append(world.add("late", "a", 50))
    world.step()
    assert own[-1].slots == () and world.slots.resident["a"] == 0
    world.slots.resident.pop("a"), world.slots.indices.pop("a")  # evicted meanwhile
    world.merging.unmerge(2)
    world.step()
    assert world.state == "leaving" and world.weights.installed == 1, "there is no slot yet"
    world.step()
    assert world.state == "none" and world.weights.installed == 0 and world.slots.resident["a"] == 4
    assert world.replies() == [(1, None), (2, None)]


def test_without_drain_others_refuse_it_whenever_they_come() -> None:
    world = World()
    world.add("other", "b", 20)
    world.merging.merge(Merge(1, "a"))
    assert world.replies() == [(1, "busy")] and world.asked == []
    world.step(30)
    world.merging.merge(Merge(2, "a"))
    world.add("base", None, 20)
    world.ready()
    assert world.replies() == [(2, "busy")] and world.state == "none"
    world.step(30)
    assert not (world.scheduler.waiting or world.scheduler.running)


def test_with_drain_what_came_before_finishes_and_what_came_later_waits() -> None:
    world = World()
    before = world.add("before", "b", 10)
    world.step(2)
    world.merging.merge(Merge(1, "a", drain=True))
    world.ready()
    after, own = world.add("after", None), world.add("own", "a", 30)
    world.step(3)
    assert world.state == "waiting" and before.num_output_tokens and own.num_output_tokens
    assert not after.num_output_tokens
    world.step(20)
    assert world.switches() == [("merge", "request"), ("unmerge", "others")] and after.num_output_tokens


def test_a_preempted_sequence_counts_as_running() -> None:
    world = World()
    before = world.add("before", "b", 10)
    world.step(2)
    world.merging.merge(Merge(1, "a", drain=True))
    world.ready()
    world.scheduler.requeue(before)
    world.step()
    assert world.state == "waiting" and world.scheduler.running == [before]


def test_where_it_need_not_give_way_others_wait_for_an_unmerge() -> None:
    world = merged_world(gives_way=False)
    base = world.add("base", None)
    world.step(20)
    assert world.state == "merged" and not base.num_output_tokens
    world.merging.unmerge(2)
    world.step(20)
    assert base.num_output_tokens == 4 and world.switches()[-1] == ("unmerge", "request")


def test_asking_twice_is_answered_and_another_is_refused() -> None:
    world = merged_world()
    world.merging.merge(Merge(2, "a"))
    world.merging.merge(Merge(3, "b", drain=True))
    assert world.replies() == [(2, None), (3, "busy")] and world.state == "merged"


def test_unmerging_what_is_not_merged_is_done_at_once() -> None:
    world = World()
    world.merging.unmerge(1)
    assert world.replies() == [(1, None)] and world.switches() == []


def test_a_merge_that_is_given_up_is_answered_and_its_weights_are_dropped() -> None:
    world = World()
    world.merging.merge(Merge(1, "a"))
    world.merging.unmerge(2)
    assert world.replies() == [(1, "busy"), (2, None)] and world.state == "none"
    world.ready()
    assert world.state == "none" and world.weights.installed == 0


def test_only_the_merged_version_leaves_when_it_is_retired() -> None:
    world = merged_world()
    world.merging.leave("retired", "b")
    assert world.state == "merged"
    world.merging.leave("retired", "a")
    world.step()
    assert world.state == "none" and world.switches()[-1] == ("unmerge", "retired")


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (MoveRefused("no_room", "too large"), "no_room"),
        (MoveRefused("not_mergeable", "no"), "not_mergeable"),
        (AdapterInvalid([Problem("file", "none", "one", "malformed_file")]), "invalid"),
        (RuntimeError("a bug"), "no_room"),
    ],
)
def test_what_fails_in_the_thread_is_the_answer(failure: Exception, code: str) -> None:
    world = World()
    world.merging.merge(Merge(1, "a"))
    world.futures[0].set_exception(failure)
    world.step()
    assert world.replies() == [(1, code)] and world.state == "none"


def test_a_failure_while_the_weights_change_places_opens_the_gate_again() -> None:
    world = World(weights=FakeMerged(broken=True))
    world.merging.merge(Merge(1, "a"))
    world.ready()
    assert world.replies() == [(1, "no_room")] and world.state == "none"
    base = world.add("base", None)
    world.step(10)
    assert base.num_output_tokens == 4


@dataclass
class Breaking(FakeMerged):
    """Weights whose exchange raises; `stays` if the base model's own cannot be put back either."""

    stays: bool = False

    def install(self) -> None:
        raise RuntimeError("a bug")

    def restore(self) -> None:
        if self.stays:
            raise RuntimeError("another")


def test_an_exchange_of_weights_that_raises_is_undone_and_answered() -> None:
    world = World(weights=Breaking())
    world.merging.merge(Merge(1, "a"))
    world.ready()
    assert world.replies() == [(1, "failed")] and world.state == "none"
    base = world.add("base", None)
    world.step(10)
    assert base.num_output_tokens == 4


def test_weights_that_cannot_be_put_back_break_the_engine() -> None:
    world = World(weights=Breaking(stays=True))
    world.merging.merge(Merge(1, "a"))
    with pytest.raises(EngineBroken, match="could not be put back"):
        world.ready()


def test_the_policy_wants_an_owner_of_the_window_with_enough_requests() -> None:
    clock = Clock()
    policy = MergePolicy(10, 3, 60, clock)
    for _ in range(4):
        policy.arrived("a")
        assert policy.choice() is None
        clock.now += 3
    assert policy.choice() == "a"
    clock.now += 30  # it went quiet
    assert policy.choice() is None
    for _ in range(3):
        policy.arrived("a")
    assert policy.choice() == "a"
    policy.arrived(None)
    assert policy.choice() is None
    clock.now += 5
    for _ in range(3):
        policy.arrived("a")
    assert policy.choice() is None  # the window begins anew
    clock.now += 10
    assert policy.choice() == "a"
    policy.ended()
    clock.now += 59
    for _ in range(3):
        policy.arrived("a")
    assert policy.choice() is None
    clock.now += 1
    assert policy.choice() == "a"


def test_the_policy_never_wants_the_base() -> None:
    clock = Clock()
    policy = MergePolicy(10, 1, 60, clock)
    policy.arrived(None)
    clock.now += 10
    policy.arrived(None)
    assert policy.choice() is None


def own_the_window(world: World) -> None:
    for _ in range(14):
        world.add(f"own{world.clock.now}", "a", 2)
        world.step(3)


def test_by_policy_it_merges_gives_way_and_rests() -> None:
    world = World(auto=True, gives_way=False)
    own_the_window(world)
    assert world.state == "preparing" and world.merging.status.asked_by == "policy"
    world.ready()
    assert world.switches() == [("merge", "policy")]
    base = world.add("base", None)
    world.step(10)
    assert world.switches() == [("unmerge", "others")] and base.num_output_tokens == 4
    own_the_window(world)
    assert world.state == "none", "the cooldown is not over"
    world.clock.now += 60
    own_the_window(world)
    assert world.state == "preparing"


def test_by_policy_nothing_is_merged_under_a_long_stream_of_another() -> None:
    world = World(auto=True)
    world.add("other", "b", 1000)
    own_the_window(world)
    assert world.state == "none" and world.asked == []


def test_asking_for_what_the_policy_merged_makes_it_stay() -> None:
    world = World(auto=True, gives_way=False)
    own_the_window(world)
    world.ready()
    world.merging.merge(Merge(1, "a"))
    world.add("base", None)
    world.step(10)
    assert world.state == "merged" and world.merging.status.asked_by == "request"


def test_a_composition_is_another() -> None:
    """Also one that contains the merged adapter, and one that scales it."""
    plain, scaled = make_seq("plain", 5, "a"), make_seq("scaled", 5, "a")
    scaled.adapters = (ScaledAdapter("a", 0.5),)
    composed = make_seq("composed", 5, "a", "b")
    gate = MergeGate("a", closed=1.0, merged=True)
    for seq in (plain, scaled, composed):
        seq.arrival = 2.0
    assert [gate.admits(seq) for seq in (plain, scaled, composed)] == [True, False, False]
    assert [gate.in_base(seq) for seq in (plain, scaled, composed)] == [True, False, False]

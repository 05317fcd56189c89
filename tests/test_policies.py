"""The order of admission: shares among tenants, priorities within a tenant, and no starvation under either."""

import random
from collections.abc import Iterable

import pytest

from server.engine.scheduling.policies import FairShare, FirstCome, Policy
from server.engine.scheduling.scheduler import Scheduler
from server.sequence import Sequence, SequenceStatus
from tests.test_scheduler import FakeSlots, make_scheduler, make_seq, run_step, run_to_end


def fair(num_blocks: int = 1000, slots: FakeSlots | None = None, **limits: int) -> Scheduler:
    scheduler = make_scheduler(num_blocks, slots, **limits)
    scheduler.policy = FairShare()
    return scheduler


def of(tenant: str, name: str, num_tokens: int = 4, *adapters: str, priority: int = 0, **settings: int) -> Sequence:
    seq = make_seq(f"{tenant}-{name}", num_tokens, *adapters, **settings)
    seq.cache_salt, seq.priority = tenant, priority
    return seq


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [seq.seq_id for seq in sequences]


def arrive(policy: Policy, *sequences: Sequence) -> None:
    for number, seq in enumerate(sequences):
        seq.number = number
        policy.arrived(seq)


def cost(sequences: Iterable[Sequence]) -> int:
    """Return the cost of the computed tokens, not counting recomputed ones."""
    return sum(seq.num_prompt_tokens + 2 * seq.num_output_tokens for seq in sequences if seq.num_output_tokens)


def test_first_come_is_the_order_of_arrival() -> None:
    seqs = [of("a", "0", priority=5), of("b", "0"), of("a", "1", priority=-5)]
    policy = FirstCome()
    arrive(policy, *seqs)
    policy.charge(seqs[0], prompt=100)
    assert list(policy.order(seqs)) == seqs


def test_the_tenant_that_was_served_least_goes_first() -> None:
    seqs = [of("a", "0"), of("a", "1"), of("b", "0")]
    policy = FairShare()
    arrive(policy, *seqs)
    assert names(policy.order(seqs)) == ["a-0", "a-1", "b-0"]
    policy.charge(seqs[0], prompt=3)
    assert names(policy.order(seqs)) == ["b-0", "a-0", "a-1"]
    policy.charge(seqs[2], generated=2)
    assert names(policy.order(seqs)) == ["a-0", "a-1", "b-0"]  # two output tokens count for more than three of input


def test_what_is_charged_between_two_counts_for_the_rest() -> None:
    """A tenant does not get ten places at once because it was behind by one."""
    seqs = [of(tenant, str(i)) for tenant in "ab" for i in range(3)]
    policy = FairShare()
    arrive(policy, *seqs)
    order = []
    for seq in policy.order(seqs):
        order.append(seq)
        policy.charge(seq, prompt=10)
    assert names(order) == ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2"]


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    policy = FairShare()
    busy, idle = of("busy", "0"), of("idle", "0")
    arrive(policy, busy)
    policy.charge(busy, prompt=1000)
    arrive(policy, idle)
    policy.charge(idle, prompt=1)
    assert names(policy.order([idle, busy])) == ["busy-0", "idle-0"]


def test_nor_has_one_that_comes_when_nobody_waits() -> None:
    policy = FairShare()
    first, second, late = of("a", "0"), of("a", "1"), of("b", "0")
    arrive(policy, first)
    policy.charge(first, prompt=1000)
    policy.left(first)
    arrive(policy, late, second)
    policy.charge(late, prompt=1)
    assert names(policy.order([late, second])) == ["a-1", "b-0"]


def test_a_tenant_that_has_used_much_is_not_forgiven_for_leaving() -> None:
    policy = FairShare()
    greedy, patient, again = of("greedy", "0"), of("patient", "0"), of("greedy", "1")
    arrive(policy, greedy, patient)
    policy.charge(greedy, prompt=1000)
    policy.left(greedy)
    arrive(policy, again)
    assert names(policy.order([again, patient])) == ["patient-0", "greedy-1"]


def test_within_a_tenant_the_most_urgent_goes_first_and_never_across() -> None:
    seqs = [of("a", "0"), of("a", "1", priority=-1), of("a", "2", priority=3), of("b", "0"), of("b", "1", priority=-9)]
    policy = FairShare()
    arrive(policy, *seqs)
    policy.charge(seqs[3], prompt=1)
    assert names(policy.order(seqs)) == ["a-1", "a-0", "a-2", "b-1", "b-0"]
    seqs[2].overdue = True
    assert names(policy.order(seqs))[:3] == ["a-2", "a-1", "a-0"]


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_tenants_with_endless_work_get_shares_by_their_weights(weight: float) -> None:
    scheduler = fair(max_num_seqs=4, max_batch_tokens=64)
    seqs: dict[str, list[Sequence]] = {"a": [], "b": []}
    for step in range(600):
        for tenant, own in seqs.items():
            while sum(seq.tenant == tenant for seq in scheduler.waiting) < 6:
                own.append(of(tenant, f"{step}-{len(own)}", 4, max_tokens=3 if tenant == "a" else 8))
                own[-1].weight = weight if tenant == "a" else 1.0
                scheduler.add(own[-1])
        run_step(scheduler)
    assert cost(seqs["a"]) / cost(seqs["b"]) == pytest.approx(weight, rel=0.05)


def latencies(policy: Policy, loads: dict[str, float], steps: int = 2000) -> dict[str, list[int]]:
    """Steps from arrival to the last token, by tenant, of those that arrived in time to finish. A tenant's requests
    arrive at random, so many in a step, and are the same whoever else is there."""
    scheduler = make_scheduler(2000, max_num_seqs=16, max_batch_tokens=64)
    scheduler.policy = policy
    chances = {tenant: random.Random(tenant) for tenant in loads}
    arrived: dict[str, list[tuple[int, Sequence]]] = {tenant: [] for tenant in loads}
    finished: dict[Sequence, int] = {}
    for step in range(steps):
        for tenant, load in loads.items():
            chance = chances[tenant]
            if chance.random() < load:
                prompt, answer = chance.randint(4, 24), chance.randint(8, 40)
                arrived[tenant].append((step, of(tenant, str(step), prompt, max_tokens=answer)))
                scheduler.add(arrived[tenant][-1][1])
        for scheduled in run_step(scheduler).sequences:
            if scheduled.seq.status is SequenceStatus.FINISHED:
                finished[scheduled.seq] = step
    measured = {tenant: seqs[: len(seqs) * 3 // 4] for tenant, seqs in arrived.items()}
    return {tenant: [finished.get(seq, steps) - start for start, seq in seqs] for tenant, seqs in measured.items()}


def p95(values: list[int]) -> int:
    return sorted(values)[len(values) * 95 // 100]


@pytest.mark.reliability("T36")
def test_a_tenant_that_sends_ten_times_as_much_does_not_slow_the_other() -> None:
    """The heavy one alone is more than the engine can do: its queue grows for as long as it goes on."""
    alone = p95(latencies(FairShare(), {"light": 0.09})["light"])
    together = latencies(FairShare(), {"heavy": 0.9, "light": 0.09})
    assert p95(together["heavy"]) > 10 * alone, "this load would be no test"
    assert p95(together["light"]) <= 1.5 * alone
    by_arrival = latencies(FirstCome(), {"heavy": 0.9, "light": 0.09})
    assert p95(by_arrival["light"]) > 10 * alone


def test_priorities_shorten_the_wait_of_the_urgent_within_their_tenant() -> None:
    scheduler = fair(max_num_seqs=1)
    for name, priority in (("calm", 1), ("usual", 0), ("urgent", -1)):
        scheduler.add(of("t", name, priority=priority, max_tokens=2))
    order: list[str] = []
    while scheduler.waiting or scheduler.running:
        for scheduled in run_step(scheduler).sequences:
            order += [scheduled.seq.seq_id] if scheduled.seq.seq_id not in order else []
    assert order == ["t-urgent", "t-usual", "t-calm"]


@pytest.mark.parametrize("bound", [1, 5, 20])
def test_an_endless_stream_of_urgent_requests_passes_a_calm_one_for_so_long_only(bound: int) -> None:
    scheduler = fair(max_num_seqs=1, max_wait_steps=bound)
    scheduler.add(calm := of("t", "calm", priority=9))
    passed = 0
    for step in range(10 * bound + 20):
        scheduler.add(of("t", f"urgent{step}", priority=-9, max_tokens=1))
        batch = run_step(scheduler)
        if calm.status is not SequenceStatus.WAITING:
            break
        passed += bool(batch)
    assert passed == bound + 1


def test_what_its_own_tenant_does_to_a_calm_one_gives_it_no_right_over_other_tenants() -> None:
    """Or a tenant could make its whole queue go first by sending urgent requests after it."""
    scheduler = fair(max_num_seqs=1, max_wait_steps=2)
    for i in range(4):
        scheduler.add(of("a", f"calm{i}", priority=1, max_tokens=1))
    for i in range(4):
        scheduler.add(of("a", f"urgent{i}", max_tokens=1))
        run_step(scheduler)
    assert all(seq.overdue for seq in scheduler.waiting if seq.priority)
    scheduler.add(of("b", "0", max_tokens=1))
    order = [names(scheduled.seq for scheduled in run_step(scheduler).sequences)[0] for _ in range(3)]
    assert "b-0" in order[:2]


@pytest.mark.reliability("T44")
@pytest.mark.parametrize("bound", [1, 5, 20])
@pytest.mark.parametrize(("tenant", "priority"), [("hot", 0), ("hot", 9), ("cold", 0), ("cold", 9)])
def test_one_request_for_another_adapter_starts_within_the_bound(bound: int, tenant: str, priority: int) -> None:
    """One slot, an endless stream of urgent requests for A, and one for B, of the same tenant or another."""
    scheduler = fair(slots=FakeSlots(num_slots=1), max_wait_steps=bound)
    for step in range(5):
        scheduler.add(of("hot", f"before{step}", 2, "A", max_tokens=3))
        run_step(scheduler)
    scheduler.add(cold := of(tenant, "b", 2, "B", priority=priority))
    waited = 0
    while cold.status is SequenceStatus.WAITING:
        scheduler.add(of("hot", f"{waited}", 2, "A", max_tokens=3))
        run_step(scheduler)
        waited += 1
        assert waited <= bound + 3 + 2  # what still runs ends in three steps, the copy takes one
    assert waited > bound
    run_to_end(scheduler)


def test_a_preempted_sequence_waits_for_its_tenant_s_turn_and_is_charged_once() -> None:
    scheduler = fair(num_blocks=4, max_batch_tokens=64)
    for name in "ab":
        scheduler.add(of("greedy", name, 4, max_tokens=12))
    run_step(scheduler)
    scheduler.add(of("patient", "late", 4))
    while len(scheduler.running) > 1:
        run_step(scheduler)
    assert names(scheduler.waiting) == ["greedy-b", "patient-late"]
    order: list[str] = []
    while scheduler.waiting or scheduler.running:
        order += names(scheduled.seq for scheduled in run_step(scheduler).sequences)
    assert order.index("patient-late") < order.index("greedy-b")
    policy = scheduler.policy
    assert isinstance(policy, FairShare)
    assert policy._served["greedy"] == 2 * (4 + 2 * 12)


def test_a_preempted_sequence_waits_in_its_tenant_by_priority_and_then_by_arrival() -> None:
    scheduler = fair(num_blocks=100, max_batch_tokens=64)
    for name, priority in (("a", 0), ("b", 5), ("c", 5)):
        scheduler.add(of("t", name, 4, priority=priority, max_tokens=12))
    run_step(scheduler)
    for seq in scheduler.running[::-1]:
        scheduler.requeue(seq)
    for name, priority in (("urgent", -1), ("usual", 0), ("calm", 5)):
        scheduler.add(of("t", name, 4, priority=priority))
    assert names(scheduler._candidates()) == [f"t-{name}" for name in ("urgent", "a", "usual", "b", "c", "calm")]


@pytest.mark.parametrize("policy", [FairShare, FirstCome])
@pytest.mark.parametrize("tenant", ["same", "other"])
@pytest.mark.parametrize("bound", [1, 4, 20])
def test_a_preempted_sequence_is_admitted_within_the_bound(bound: int, tenant: str, policy: type[Policy]) -> None:
    """Beside an endless stream of more urgent requests, of its tenant or another, over memory for two."""
    scheduler = make_scheduler(num_blocks=12, max_batch_tokens=64, max_wait_steps=bound)
    scheduler.policy = policy()
    scheduler.add(of(tenant, "first", 4, max_tokens=8))
    scheduler.add(large := of("same", "large", 12, priority=9, max_tokens=24))
    step = 0
    while large.status is not SequenceStatus.FINISHED:
        scheduler.add(of(tenant, f"{step}", 4, priority=-1, max_tokens=8))
        if step >= 3 and large in scheduler.running and not large.preempted:
            scheduler.requeue(large)
        overdue, before = large.overdue and large.status is SequenceStatus.WAITING, {*scheduler.running}
        run_step(scheduler)
        if overdue and large.status is SequenceStatus.WAITING:
            assert not [seq for seq in scheduler.running if seq not in before and seq.tenant == "same"]
        step += 1
        assert step < 40 + 10 * bound
    assert large.preempted and large.num_output_tokens == 24


def preempted(scheduler: Scheduler) -> list[str]:
    return names(seq for seq in scheduler.waiting if seq.preempted)


def test_memory_is_taken_from_the_tenant_that_holds_too_much_of_it() -> None:
    """The newest is the small tenant's only one; under fcfs it goes all the same."""
    for policy, victim in ((FairShare(), "heavy-2"), (FirstCome(), "light-0")):
        scheduler = make_scheduler(num_blocks=12, max_batch_tokens=64)
        scheduler.policy = policy
        for i in range(3):
            scheduler.add(of("heavy", f"{i}", 8, max_tokens=32))
        run_step(scheduler)
        scheduler.add(of("light", "0", 4, max_tokens=16))
        while not scheduler.preemptions:
            run_step(scheduler)
        assert preempted(scheduler) == [victim]
        run_to_end(scheduler)


def test_within_the_tenant_the_least_urgent_is_preempted_first() -> None:
    scheduler = fair(num_blocks=9, max_batch_tokens=64)
    for name, priority in (("first", 9), ("calm", 5), ("urgent", -1), ("usual", 0)):
        scheduler.add(of("t", name, 8, priority=priority, max_tokens=12))
        run_step(scheduler)
    order: list[str] = []
    while scheduler.waiting or scheduler.running:
        order += [name for name in preempted(scheduler) if name not in order]
        run_step(scheduler)
    assert order[0] == "t-calm", "the first one admitted is never preempted"


@pytest.mark.parametrize(("weight", "victim"), [(1.0, "a-1"), (4.0, "b-1")])
def test_the_share_of_memory_is_by_weight(weight: float, victim: str) -> None:
    running = [of(tenant, f"{i}") for tenant in "bab" for i in range(2)][:4]
    for seq, blocks in zip(running, (4, 2, 7, 7), strict=True):
        seq.block_table = list(range(blocks))
        seq.weight = weight if seq.tenant == "a" else 1.0
    assert FairShare().victim(running).seq_id == victim


@pytest.mark.parametrize("policy", [FairShare, FirstCome])
def test_the_first_one_admitted_is_preempted_only_alone(policy: type[Policy]) -> None:
    first, second = of("heavy", "0"), of("light", "0")
    first.block_table = [1, 2, 3]
    assert policy().victim([first, second]) is second
    assert policy().victim([first]) is first


@pytest.mark.parametrize("seed", range(15))
def test_whatever_comes_everything_ends_and_none_of_its_own_takes_what_an_overdue_one_lacks(seed: int) -> None:
    """Random tenants, priorities, adapters and aborts over little memory and few slots."""
    chance = random.Random(seed)
    slots = FakeSlots(num_slots=chance.choice([1, 2]))
    bound = chance.choice([1, 4, 20])
    scheduler = fair(12, slots, max_num_seqs=chance.choice([2, 4]), max_batch_tokens=40, max_wait_steps=bound)
    for step in range(150):
        if chance.random() < 0.4:
            adapters = chance.sample(["x", "y", "z"], chance.randint(0, slots.num_slots))
            priority, length = chance.randint(-2, 2), chance.randint(1, 10)
            seq = of(chance.choice("abc"), f"{step}", chance.randint(1, 20), *adapters, priority=priority)
            seq.sampling = type(seq.sampling)(max_tokens=length)
            scheduler.add(seq)
        if scheduler.waiting and chance.random() < 0.1:
            scheduler.finish(chance.choice(list(scheduler.waiting)))
        overdue = [seq for seq in scheduler.waiting if seq.overdue]
        new = [seq for seq in scheduler.waiting if not seq.preempted]
        run_step(scheduler)
        admitted = [seq for seq in new if seq.status is not SequenceStatus.WAITING]
        for late in (seq for seq in overdue if seq.status is SequenceStatus.WAITING):
            if len(late.read) < len(late.adapters) or slots.promised & {*late.digests}:
                continue  # its adapters are on their way
            competing = [seq for seq in admitted if seq.adapters or not late.adapters]
            assert not any(seq.tenant == late.tenant and seq.number > late.number for seq in competing)
    run_to_end(scheduler)
    assert scheduler.blocks.num_used == 0
    policy = scheduler.policy
    assert isinstance(policy, FairShare)
    assert not policy._waiting

"""The simulator: the same input gives the same run, nothing is lost, and times are those of the cost model."""

import random
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters.errors import MoveRefused
from load_tests.simulator.clock import Clock, VirtualExecutor
from load_tests.simulator.cost import PROFILES, Profile, StepWork, fit, load_profile
from load_tests.simulator.engine import Record, Result, Setting, Simulation
from load_tests.simulator.report import Finding, write, write_docs
from load_tests.simulator.scenarios import SCENARIOS, Scenario, best_shares, simulate
from load_tests.simulator.summary import entitled, jain, percentile, summarize
from load_tests.simulator.workload import BASE, Lengths, Request, Workload, cold_burst, generate, merged, ranks
from server.engine.merging import Merged, Merging
from server.engine.scheduling.policies import FairShare, FirstCome, Policy
from server.ipc.messages import Merge
from tests.test_merging import FakeMerged

ROUND = Profile(
    about="numbers that are easy to add up",
    step_ms=10.0,
    token_ms=1.0,
    lora_ms=2.0,
    lora_token_ms=0.25,
    adapter_ms=0.5,
    context_token_us=0.0,
    read_ms=60.0,
    read_gb_s=1.0,
    write_ms=30.0,
    write_gb_s=2.0,
    adapter_page_bytes=40_000_000,
    kv_bytes_per_token=1000,
)
SMALL = Workload(requests=300, rate=60.0, burst=3.0, ramp=0.3, adapters=40, prompt=Lengths(20, 0.6, 80))


def setting(slots: int = 16, **changes: Any) -> Setting:
    return Setting(**{"slots": slots, "kv_bytes": 4_000_000, "max_queue": 1000, **changes})


def run(requests: list[Request], setting: Setting, adapter_ranks: list[int]) -> Result:
    return Simulation(setting, ROUND, adapter_ranks).run(requests)


def asking(*arrivals: float, adapter: int = 0, prompt: int = 4, output: int = 3) -> list[Request]:
    return [Request(arrival, adapter, "all", prompt, output) for arrival in arrivals]


# -- workload ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_workload() -> None:
    assert generate(SMALL) == generate(SMALL)
    assert generate(SMALL) != generate(msgspec.structs.replace(SMALL, seed=1))


def test_arrivals_keep_the_mean_rate_and_come_in_bursts() -> None:
    load = Workload(requests=20_000, rate=10.0, burst=3.0)
    arrivals = [request.arrival for request in generate(load)]
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(10.0, rel=0.05)
    in_burst = sum(arrival % 60 < 12 for arrival in arrivals) / len(arrivals)
    assert in_burst == pytest.approx(3 * 0.2 / (3 * 0.2 + 0.8), rel=0.05)


def test_a_ramp_moves_arrivals_to_the_end() -> None:
    arrivals = [request.arrival for request in generate(Workload(requests=10_000, rate=10.0, ramp=0.5))]
    early = sum(arrival < arrivals[-1] / 2 for arrival in arrivals) / len(arrivals)
    assert early == pytest.approx(0.375, abs=0.02)  # the mean of 0.5 … 1.0 over twice the mean of 0.5 … 1.5


def test_adapters_are_as_popular_as_zipf_says() -> None:
    asked = Counter(request.adapter for request in generate(Workload(requests=50_000, adapters=1000)))
    harmonic = sum(1 / n for n in range(1, 1001))
    for adapter in (0, 1, 9):
        assert asked[adapter] / 50_000 == pytest.approx(1 / (adapter + 1) / harmonic, rel=0.1)


def test_a_cold_burst_asks_for_adapters_outside_the_population() -> None:
    burst = cold_burst(5.0, 10, SMALL)
    assert [request.adapter for request in burst] == list(range(40, 50))
    both = merged(generate(SMALL), burst)
    assert len(both) == 310
    assert all(a.arrival <= b.arrival for a, b in pairwise(both))


# -- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-cpu", "invented-gpu"])
@pytest.mark.parametrize("more", ["tokens", "context_tokens", "token_ranks", "adapter_ranks"])
def test_more_work_never_takes_less_time(name: str, more: str) -> None:
    profile = load_profile(name)
    for amount in (0, 1, 1000):
        work = StepWork(8, 100, 128, 32)
        before = profile.step_seconds(work)
        setattr(work, more, getattr(work, more) + amount)
        assert profile.step_seconds(work) >= before
    for low, high in pairwise((1, 16, 17, 64, 256)):
        assert 0 < profile.read_seconds(low) <= profile.read_seconds(high)
        assert 0 < profile.write_seconds(low) <= profile.write_seconds(high)


def test_a_profile_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(PROFILES.read_text().replace("[invented-gpu]", "[invented-gpu]\nstep_msec = 3"))
    assert load_profile("smollm2-cpu", file) == load_profile("smollm2-cpu")
    with pytest.raises(msgspec.ValidationError, match="step_msec"):
        load_profile("invented-gpu", file)


def test_measured_steps_give_their_coefficients_back() -> None:
    rng = random.Random(0)
    works = [StepWork(rng.randint(1, 64), 0, rng.randint(1, 900), rng.choice((0, 16, 160))) for _ in range(20)]
    for work in works:
        work.token_ranks *= work.adapter_ranks > 0
    found = fit((work, ROUND.step_seconds(work)) for work in works)
    assert found == pytest.approx({name: getattr(ROUND, name) for name in found})
    with pytest.raises(ValueError, match="too alike"):
        fit([(StepWork(n), 0.1) for n in range(9)])


# -- time ----------------------------------------------------------------------------------------------------------


def test_virtual_threads_take_jobs_in_order() -> None:
    clock, done = Clock(), []
    executor = VirtualExecutor(clock, 2, seconds=lambda name, seconds: seconds)
    for name, seconds in (("a", 3.0), ("b", 1.0), ("c", 1.0), ("d", 5.0)):
        executor.submit(lambda name, seconds: done.append((name, clock.now)), name, seconds)
    while (end := executor.next_end()) is not None:
        clock.now = end
        executor.run_due()
    assert done == [("b", 1.0), ("c", 2.0), ("a", 3.0), ("d", 7.0)]


def test_a_cancelled_job_is_not_done() -> None:
    clock, done = Clock(), []
    executor = VirtualExecutor(clock, 1, seconds=lambda name: 1.0)
    futures = [executor.submit(done.append, name) for name in "ab"]
    assert futures[0].cancel()
    clock.now = 2.0
    executor.run_due()
    assert done == ["b"]
    assert futures[1].done()


def test_a_request_takes_the_time_that_the_cost_model_says() -> None:
    """Rank 16 is one page of 40 MB: 100 ms to read and 50 to copy. Then 4 tokens of prefill and two decode steps."""
    result = run(asking(1.0), setting(), [16])
    (record,) = result.records
    lora = 0.002 + 16 * 0.0005  # of a step with this adapter
    assert (record.end, record.found, record.tokens) == ("done", "disk", 3)
    assert record.admitted == pytest.approx(1.0 + 0.1 + 0.05)
    assert record.first_token == pytest.approx(record.admitted + 0.010 + 4 * (0.001 + 16 * 0.00025) + lora)
    assert record.finished == pytest.approx(record.first_token + 2 * (0.010 + (0.001 + 16 * 0.00025) + lora))
    assert record.waited_steps == 0, "nobody overtook it"
    assert (result.steps, result.reads, result.writes) == (3, 1, 1)
    assert result.seconds == pytest.approx(record.finished - 1.0)


def test_requests_share_steps() -> None:
    """The second arrives while the first's prefill runs, and is prefilled beside the first's next token."""
    first, second = run(asking(0.0, 0.16), setting(), [16]).records
    assert first.found == "disk"
    assert second.found == "device"
    assert second.admitted == pytest.approx(first.first_token)
    lora = 0.002 + 16 * 0.0005
    assert second.first_token == pytest.approx(second.admitted + 0.010 + 5 * (0.001 + 16 * 0.00025) + lora)


# -- whole runs ----------------------------------------------------------------------------------------------------


def test_the_same_run_twice_is_the_same() -> None:
    first, second = (run(generate(SMALL), setting(4), ranks(40)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "given",
    [
        setting(4, host_bytes=400_000_000),
        setting(8, pages=9, host_bytes=0),  # pages run out before slots do
        setting(64, kv_bytes=400_000),  # 25 blocks: preemption
        setting(1, max_wait_steps=3),
        setting(4, streams=7),
        setting(2, max_queue=5),
    ],
)
def test_every_request_ends_once_and_the_books_balance(given: Setting) -> None:
    requests = generate(SMALL)
    simulation = Simulation(given, ROUND, ranks(40))
    steps = 0
    take_step = simulation.step

    def checked_step() -> bool:
        nonlocal steps
        steps += 1
        ran = take_step()
        if steps % 20 == 0:
            simulation.check_integrity()
        return ran

    simulation.step = checked_step  # type: ignore[method-assign]
    result = simulation.run(requests)
    simulation.check_integrity()
    assert [record.request for record in result.records] == requests
    for record in result.records:
        assert record.end == "done" or (record.end == "refused" and given.max_queue == 5)
        if record.end == "done":
            assert record.tokens == record.request.output_tokens
            assert record.arrival <= record.admitted < record.first_token <= record.finished
    assert result.step_tokens >= sum(record.tokens - 1 + record.request.prompt_tokens for record in served(result))
    assert (result.preemptions > 0) == (given.kv_bytes == 400_000)
    assert not (simulation.scheduler.waiting or simulation.scheduler.running)
    assert simulation.scheduler.blocks.num_used == 0
    assert steps > 20


def served(result: Result) -> list[Record]:
    return [record for record in result.records if record.end == "done"]


def test_a_full_queue_refuses() -> None:
    result = run(asking(*[0.0] * 20), setting(max_queue=6), [16])
    assert [record.end for record in result.records] == ["done"] * 6 + ["refused"] * 14


def test_a_closed_loop_keeps_its_streams() -> None:
    """Arrival times do not count; the next request comes when one ends."""
    records = run(asking(*[99.0] * 10, output=5), setting(streams=3), [16]).records
    for record in records:
        assert sum(other.arrival <= record.arrival < other.finished for other in records) <= 3
    assert [record.arrival for record in records[:3]] == [0.0] * 3
    assert records[3].arrival == min(record.finished for record in records[:3])


def starved(max_wait_steps: int) -> Record:
    """One request for another adapter in traffic that would keep the only slot for ever."""
    endless = generate(Workload(requests=700, rate=100.0, adapters=1, output=Lengths(16, 0.5, 40)))
    lonely = Request(1.0, 1, "lonely", 8, 8)
    given = setting(1, max_wait_steps=max_wait_steps, max_num_seqs=16)
    records = run(merged(endless, [lonely]), given, [16]).records
    return next(record for record in records if record.request is lonely)


def test_a_cold_adapter_starts_within_the_bound() -> None:
    """Past the bound nobody new gets in; then the longest answer that runs, and the load, are all that is left."""
    for bound in (5, 50):
        assert bound < starved(bound).waited_steps <= bound + 40 + 2
    assert starved(10**6).waited_steps > 300, "without a bound it would have starved"


@pytest.mark.parametrize("policy", [FirstCome, FairShare])
def test_an_endless_stream_of_slow_loads_delays_nobody_else(policy: type[Policy]) -> None:
    """Loads take 8 s, and cold requests come faster than that; base, pinned and resident traffic starts as without
    them."""
    pinned, resident, slow = 0, 1, msgspec.structs.replace(ROUND, read_ms=8000.0)
    start = 20.0  # the loads of the other two are over
    others = [Request(start + 0.5 * n, (BASE, pinned, resident)[n % 3], "all", 8, 4) for n in range(120)]
    warm_up = [Request(9.0, resident, "all", 8, 4)]
    cold = [Request(start + 1.5 * n, 2 + n, "all", 8, 4) for n in range(40)]

    def first_tokens(requests: list[Request]) -> list[float]:
        simulation = Simulation(setting(4, pinned=(pinned,), max_wait_steps=256), slow, [16])
        simulation.scheduler.policy = policy()
        records = simulation.run(requests).records
        assert all(record.end == "done" for record in records)
        return [record.first_token - record.arrival for record in records if record.request in others]

    alone, beside = first_tokens(warm_up + others), first_tokens(warm_up + merged(others, cold))
    assert max(beside) <= 1.2 * max(alone)
    assert sum(beside) <= 1.2 * sum(alone)


def test_chat_beside_long_prompts_keeps_its_pace_under_a_target() -> None:
    """At any length of the prompts, on both profiles, and for the same throughput."""
    scenario = SCENARIOS["long_prompts"](100)
    found = {(run.profile, run.x, run.setting.max_step_ms): simulate(run) for run in scenario.runs}
    for (profile, tokens, ms), target in found.items():
        fixed = found[profile, tokens, None]
        if ms is not None:
            alone = load_profile(profile).step_seconds(StepWork(8))
            assert target.gap_max_s <= 2 * max(0.15, 2 * alone) < fixed.gap_max_s
            assert target.tokens_per_s >= 0.97 * fixed.tokens_per_s
            assert target.refused == fixed.refused == 0


# -- report --------------------------------------------------------------------------------------------------------


def test_fairness() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert entitled(100.0, {"a": 500.0, "b": 10.0}) == {"b": 10.0, "a": 90.0}
    assert entitled(90.0, {"a": 500.0, "b": 60.0, "c": 20.0}) == {"c": 20.0, "b": 35.0, "a": 35.0}


def test_percentiles() -> None:
    assert percentile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0
    assert percentile([], 0.5) == 0.0


def test_a_summary_counts_what_was_served() -> None:
    requests = generate(msgspec.structs.replace(SMALL, tenants=(("a", 3.0), ("b", 1.0))))
    result = run(requests, setting(8, max_queue=20), ranks(40))
    found = summarize(result)
    assert found.requests == 300
    assert found.refused == 300 - len(served(result)) == sum(tenant.refused for tenant in found.tenants.values())
    assert found.tokens_per_s * found.virtual_s == pytest.approx(sum(record.tokens for record in result.records))
    assert 0 < found.device_hits < 1
    assert 0.5 < found.fairness <= 1
    assert max(wait for _, wait in found.timeline) >= found.wait_p99_s


def test_every_scenario_runs_and_is_reported(tmp_path: Path) -> None:
    findings = []
    for name in ("slots", "cold", "tenants", "split"):
        scenario = SCENARIOS[name](60)
        scenario = msgspec.structs.replace(scenario, runs=[*scenario.runs[:2], *scenario.runs[-1:]])
        findings.append(Finding(scenario, [simulate(run) for run in scenario.runs]))
    json_file, html_file = write(findings[:3], tmp_path)
    assert msgspec.json.decode(json_file.read_bytes(), type=list[Finding]) == findings[:3]
    assert html_file.read_text().count("data:image/png;base64,") == 3

    document = tmp_path / "simulation.md"
    document.write_text("before\n<!-- table: tenants -->\nold\n<!-- end -->\nafter\n")
    write_docs([findings[2]], document)
    text = document.read_text()
    assert "| both | 2 |" in text
    assert "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert (tmp_path / "images" / "simulation-tenants.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_common_share_serves_a_day_of_every_mix_soonest() -> None:
    scenario = SCENARIOS["split"](60)
    base = simulate(SCENARIOS["slots"](60).runs[0])
    # The more bytes adapters get the better for the first mix, the worse for the others.
    speed = {run: run.x if run.series.startswith("many") else 1.01 - run.x for run in scenario.runs}
    found = [msgspec.structs.replace(base, virtual_s=base.requests / speed[run]) for run in scenario.runs]
    rows = list(best_shares(scenario, found))
    assert [row[1] for row in rows] == ["0.9", "0.05", "0.05"] * 2
    assert {row[3] for row in rows} == {0.4}
    assert all(row[2] >= row[4] for row in rows)


def test_a_scenario_s_runs_are_told_apart() -> None:
    for make in SCENARIOS.values():
        scenario: Scenario = make(100)
        points = [(run.series, run.x) for run in scenario.runs]
        assert len(points) == len(set(points)), scenario.name


@pytest.mark.parametrize("seed", range(3))
def test_operators_merges_and_crashes_leave_the_books_balanced(seed: int) -> None:
    """Adapters are pinned and unloaded, merged and unmerged, and all that runs is lost now and then and asked again."""
    chance, ids, steps = random.Random(seed), count(), 0
    simulation = Simulation(setting(4, kv_bytes=600_000, max_wait_steps=20, host_bytes=400_000_000), ROUND, ranks(40))
    merging = Merging(simulation.scheduler, lambda *_: ready(FakeMerged()), clock=lambda: simulation.clock.now)
    take_step, crashes = simulation.step, 0

    def crash() -> None:
        """As seen by the clients of an engine that is started again; what it has in memory may as well stay."""
        for seq in [*simulation.scheduler.running, *simulation.scheduler.waiting]:
            simulation.scheduler.finish(seq)
            request = simulation._records.pop(seq.seq_id).request
            simulation.submit(request._replace(arrival=simulation.clock.now))

    def operate() -> None:
        digest, kind = str(chance.randrange(40)), chance.randrange(40)
        residency = simulation.residency
        if kind in (0, 1) and not residency.pinned() and residency.where(digest) == "device":
            with suppress(MoveRefused):  # no room would be left
                residency.pin(digest)
        if kind in (2, 3):
            for pinned in residency.pinned():
                residency.unpin(pinned)
        if kind == 4:
            with suppress(MoveRefused):  # it is in use
                residency.unload(digest)
        if kind == 5:
            merging.merge(Merge(next(ids), digest, drain=True))
        if kind == 6:
            merging.unmerge(next(ids))

    def troubled_step() -> bool:
        nonlocal steps, crashes
        steps += 1
        before = merging.status
        merging.advance()
        merging.take_replies()
        ran = take_step()
        if ran:
            operate()
        if steps % 200 == 199:
            crash()
            crashes += 1
        if steps % 5 == 0:
            simulation.check_integrity()
        return ran or merging.status != before

    simulation.step = troubled_step  # type: ignore[method-assign]
    result = simulation.run(generate(SMALL))
    ended = [record for record in result.records if record.end == "done"]
    assert len(ended) == SMALL.requests and all(r.tokens == r.request.output_tokens for r in ended)
    directions = {switch.direction for switch in merging.take_switches()}
    assert crashes and result.preemptions and directions == {"merge", "unmerge"}
    assert simulation.scheduler.blocks.num_used == 0 and not (
        simulation.scheduler.waiting or simulation.scheduler.running
    )


def ready(merged: FakeMerged) -> "Future[Merged]":
    future: Future[Merged] = Future()
    future.set_result(merged)
    return future

"""The questions that are put to the simulator, as lists of runs."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Literal

import msgspec

from load_tests.simulator.cost import load_profile
from load_tests.simulator.engine import Setting, Simulation
from load_tests.simulator.summary import Summary, summarize
from load_tests.simulator.workload import BASE, Lengths, Workload, cold_burst, generate, merged, ranks

CPU, LARGE_CPU, GPU = "smollm2-cpu", "llama-1b-cpu", "invented-gpu"
SATURATED = 64  # streams of a closed loop that keeps every place in the batch taken
MIB = 1 << 20


class Run(msgspec.Struct, frozen=True):
    series: str
    x: float
    workload: Workload
    setting: Setting = Setting()
    profile: str = CPU
    cold: tuple[float, int] | None = None  # at this second, requests for so many adapters never seen before
    long: Workload | None = None  # merged into the other, for the base model


class Scenario(msgspec.Struct, frozen=True):
    name: str
    title: str
    x_label: str
    runs: list[Run]
    columns: tuple[str, ...]  # fields of Summary, in the table
    plots: tuple[str, ...]  # fields of Summary, over x
    scale: Literal["linear", "log"] = "linear"  # of x


def simulate(run: Run) -> Summary:
    requests = generate(run.workload)
    if run.cold is not None:
        requests = merged(requests, cold_burst(*run.cold, run.workload))
    if run.long is not None:
        requests = merged(requests, [request._replace(adapter=BASE) for request in generate(run.long)])
    adapter_ranks = ranks(run.workload.adapters)
    return summarize(Simulation(run.setting, load_profile(run.profile), adapter_ranks).run(requests))


def traffic(requests: int) -> Scenario:
    """The large one: bursts and a ramp over 10,000 adapters, with the server's defaults and with more slots."""
    load = Workload(requests=20 * requests, rate=3.2, ramp=0.2, burst=2.0)
    runs = [Run("bursts and a ramp", slots, load, Setting(slots)) for slots in (16, 64)]
    columns = ("tokens_per_s", "wait_p50_s", "wait_p99_s", "refused", "device_hits", "host_hits", "waited_steps")
    return Scenario("traffic", f"{20 * requests:,} requests over 10,000 adapters", "slots", runs, columns, ())


def slots(requests: int) -> Scenario:
    """How many slots? Throughput when there is always more to do, waits at a load that all slots could hold."""
    counts = (4, 8, 16, 32, 64, 128)
    load = Workload(requests=requests, rate=3.2, burst=2.0)
    open_loop = [Run("3.2 requests/s, bursts", n, load, Setting(n)) for n in counts]
    closed = [Run("saturated", n, load, Setting(n, streams=SATURATED)) for n in counts]
    shared = [Run("saturated, 64 pages in all", n, load, Setting(n, 64, streams=SATURATED)) for n in (16, 32, 64)]
    sixteen = [Run("16 streams, 2,000 adapters", n, _few_streams(requests), Setting(n, streams=16)) for n in counts]
    columns = (
        "tokens_per_s", "wait_p50_s", "wait_p99_s", "refused", "device_hits", "reads_per_1000", "writes_per_1000",
        "adapters_per_step",
    )  # fmt: skip
    plots = ("tokens_per_s", "wait_p50_s", "wait_p99_s", "device_hits")
    return Scenario("slots", "Device slots", "slots", [*open_loop, *closed, *shared, *sixteen], columns, plots, "log")


def _few_streams(requests: int) -> Workload:
    return Workload(requests=requests, adapters=2000)


def zipf(requests: int) -> Scenario:
    runs = [
        Run(f"Zipf {s}", n, Workload(requests=requests, zipf=s), Setting(n, streams=SATURATED))
        for s, n in product((0.8, 1.0, 1.2), (16, 32, 64, 128))
    ]
    columns = ("tokens_per_s", "device_hits", "host_hits", "reads_per_1000", "writes_per_1000", "adapters_per_step")
    return Scenario(
        "zipf", "Popularity of adapters", "slots", runs, columns, ("tokens_per_s", "device_hits", "host_hits"), "log"
    )


def cold(requests: int) -> Scenario:
    """What a burst of adapters that nobody used before costs, over the same traffic without it."""
    load = Workload(requests=requests, rate=2.0, adapters=32)
    at = requests / load.rate / 2
    runs = [
        Run(f"{count} cold adapters in a second", n, load, Setting(n), cold=(at, count) if count else None)
        for count, n in product((0, 64, 200), (16, 32, 64))
    ]
    return Scenario(
        "cold", "A burst of cold adapters", "slots", runs, ("tokens_per_s", "wait_p99_s", "waited_steps"), ()
    )


def tenants(requests: int) -> Scenario:
    """Two tenants, one of which sends ten times as much; and the other alone."""
    both, alone = (("heavy", 10.0), ("light", 1.0)), (("light", 1.0),)
    runs = []
    for rate in (2.0, 4.0, 6.0, 8.0):
        few = Workload(adapters=32, requests=requests, rate=rate, tenants=both)
        runs.append(Run("both", rate, few, Setting(32)))
        light = msgspec.structs.replace(few, requests=requests // 11, rate=rate / 11, tenants=alone)
        runs.append(Run("light alone", rate, light, Setting(32)))
    columns = ("tokens_per_s", "fairness", "refused", "latency_p95_s", "tenants")
    return Scenario(
        "tenants", "Two tenants, 10 : 1", "requests per second", runs, columns, ("fairness", "latency_p95_s")
    )


def starvation(requests: int) -> Scenario:
    """One slot, more traffic for one adapter than can be served, and one request for another."""
    load = Workload(requests=min(requests, 3000), rate=12.0, adapters=1)
    runs = [
        Run("one request for another adapter", bound, load, Setting(1, max_wait_steps=bound), cold=(30.0, 1))
        for bound in (16, 64, 256)
    ]
    return Scenario("starvation", "Starvation", "max_wait_steps", runs, ("waited_steps", "wait_p99_s", "tenants"), ())


def bound(requests: int) -> Scenario:
    """What the aging bound costs: closing the door empties the batch, so a small bound is paid in throughput."""
    load = Workload(requests=requests, rate=3.2, burst=2.0)
    bounds = (4, 16, 64, 256, 1024)
    runs = [
        *(Run("saturated, 16 slots", n, load, Setting(max_wait_steps=n, streams=SATURATED)) for n in bounds),
        *(Run("3.2 requests/s, bursts, 8 slots", n, load, Setting(8, max_wait_steps=n)) for n in bounds),
    ]
    columns = ("tokens_per_s", "wait_p50_s", "wait_p99_s", "latency_p95_s", "device_hits", "waited_steps")
    return Scenario(
        "bound", "The aging bound", "max_wait_steps", runs, columns, ("tokens_per_s", "wait_p50_s", "wait_p99_s"), "log"
    )


SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIXES = {
    "many adapters, short": Workload(prompt=Lengths(48, 0.6, 256), output=Lengths(24, 0.6, 96)),
    "some adapters, middling": Workload(adapters=300, prompt=Lengths(192, 0.6, 768), output=Lengths(48, 0.6, 192)),
    "few adapters, long": Workload(adapters=8, prompt=Lengths(384, 0.6, 1536), output=Lengths(96, 0.6, 384)),
}


def split(requests: int) -> Scenario:
    """One budget of bytes for adapters and KV cache: which share of it should the adapters have?"""
    runs = [
        Run(f"{mix}; {profile}", share, _few(load, requests), _split_setting(profile, budget, share), profile)
        for (profile, budget), (mix, load), share in product(
            ((CPU, 512 * MIB), (GPU, 8192 * MIB)), MIXES.items(), SHARES
        )
    ]
    columns = ("tokens_per_s", "wait_p99_s", "preemptions", "writes_per_1000")
    return Scenario(
        "split", "One budget for adapters and KV cache", "adapters' share", runs, columns, ("tokens_per_s",)
    )


def _few(load: Workload, requests: int) -> Workload:
    return msgspec.structs.replace(load, requests=max(requests // 4, 100))


def _split_setting(profile: str, budget: int, share: float) -> Setting:
    page = load_profile(profile).adapter_page_bytes
    pages = max(int(share * budget) // page, 4)  # the largest rank must fit
    host = (2 if profile == CPU else 64) << 30
    return Setting(pages, pages, host_bytes=host, kv_bytes=budget - pages * page, streams=SATURATED)


def long_prompts(requests: int) -> Scenario:
    """Chat streams beside long prompts, with a fixed budget of tokens and with chunks that follow a target."""
    runs = []
    for profile, rate, every in ((CPU, 1.0, 30.0), (LARGE_CPU, 0.08, 300.0)):
        chat = Workload(requests=requests // 2, rate=rate, adapters=8, tenants=(("chat", 1.0),))
        count = max(round(chat.requests / rate / every), 1)
        for tokens, ms in product((500, 2000, 4000), (None, 0.0)):
            long = Workload(count, 1 / every, tenants=(("long", 1.0),), prompt=Lengths(tokens, 0.0, tokens), seed=1)
            name = f"{'fixed budget' if ms is None else 'target'}; {profile}"
            runs.append(Run(name, tokens, chat, Setting(max_step_ms=ms), profile, long=long))
    columns = ("gap_p50_s", "gap_p99_s", "gap_max_s", "first_tokens", "tokens_per_s")
    return Scenario("long_prompts", "Chat streams beside long prompts", "tokens of a prompt", runs, columns, ())


SCENARIOS: dict[str, Callable[[int], Scenario]] = {
    made.__name__: made for made in (traffic, slots, zipf, cold, tenants, starvation, bound, split, long_prompts)
}


def best_shares(scenario: Scenario, found: list[Summary]) -> Iterator[tuple[str, str, float, float, float]]:
    """Of every profile in `split`: mix, best share, tokens per second there and at the profile's best common share.

    The best common share is that with which a day of as many requests of each mix is over soonest: what a split that
    does not move can do. What one that moves at run time can do is bounded by each mix at its own best share.
    """
    speeds: dict[str, dict[str, dict[float, float]]] = {}
    for run, summary in zip(scenario.runs, found, strict=True):
        mix = run.series.removesuffix(f"; {run.profile}")
        served = summary.requests / summary.virtual_s
        speeds.setdefault(run.profile, {}).setdefault(mix, {})[run.x] = served
    for profile, mixes in speeds.items():
        common = min(SHARES, key=lambda share: sum(1 / by_share[share] for by_share in mixes.values()))
        for mix, by_share in mixes.items():
            best = max(by_share, key=lambda share: by_share[share])
            yield f"{mix}; {profile}", f"{best:g}", by_share[best], common, by_share[common]

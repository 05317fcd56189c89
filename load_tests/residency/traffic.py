"""Throughput of 2,000 adapters over 32 device slots, beside the same requests with all their adapters resident.

Two servers over the same adapters run in turn: one with few slots, and one with a slot for every adapter that a round
asks for, loaded before the round. So both sides of a ratio are the same requests, with as many adapters in a step.
Adapters have packed copies, as published ones do; `LORAPLEX_ADAPTER_PACKED_BYTES=0` measures without them.
"""

import asyncio
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np

from load_tests.client import Clock, Record, new_client
from load_tests.own_server import serving
from load_tests.residency.filling import fill, template, variants
from load_tests.runner import send
from load_tests.scenarios import Bounds, Closed, Lognormal, Models, Scenario, Slo
from load_tests.schedule import Planned, build

TIMEOUT_S = 60.0
WARMING = 600  # draws from the same popularity that fill the host tier as earlier traffic would have
LOADS_AT_ONCE = 4


class Setting(msgspec.Struct, frozen=True):
    adapters: int = 2000
    slots: int = 32
    streams: int = 16
    rank: int = 16
    requests: int = 96  # in a round
    rounds: int = 3
    loaded_before: int = 1  # 1: every adapter was loaded once before, as its self-test does when it is published


class Round(msgspec.Struct, frozen=True):
    """Of one server: output tokens per second, first tokens in seconds, requests that failed by their error."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    errors: list[str]


def scenario(setting: Setting) -> Scenario:
    return Scenario(
        name="traffic",
        description="Zipf 1.0, closed loop",
        arrivals=Closed(streams=setting.streams),
        models=Models("zipf", 1.0),
        prompt_tokens=Lognormal(median=96, sigma=0.6, low=8, high=512),
        output_tokens=Lognormal(median=32, sigma=0.6, low=4, high=128),
        bounds=Bounds(duration_s=3600, max_requests=setting.requests, request_timeout_s=TIMEOUT_S),
        slo=Slo(ttft_s=2.0, itl_s=0.4),
    )


def run(setting: Setting) -> bool:
    """Print the rounds and the ratio; whether the target is met."""
    with tempfile.TemporaryDirectory() as folder:
        versions = variants(template(Path(folder), setting.rank), Path(folder) / "versions", setting.adapters)
        names = fill(Path(folder) / "few", versions)
        fill(Path(folder) / "all", versions)
        common = ("--max-adapter-rank", str(setting.rank))
        few = serving(Path(folder) / "few", *common, "--adapter-slots", str(setting.slots))
        resident = serving(Path(folder) / "all", *common, "--adapter-slots", str(2 * setting.requests))
        with few as few_url, resident as resident_url:
            rounds = asyncio.run(_measure(setting, names, few_url, resident_url))
    return report(setting, rounds)


async def _measure(setting: Setting, names: list[str], few_url: str, all_url: str) -> list[tuple[Round, Round]]:
    rounds = []
    async with new_client(few_url, None) as few, new_client(all_url, None) as resident:
        if setting.loaded_before:
            await load(few, names, "host")
        await load(few, drawn(names, WARMING), "host")
        for number in range(-1, setting.rounds):  # the first one warms up
            schedule = build(scenario(setting), "base", names, seed=number + 1)
            await load(resident, sorted({planned.model for planned in schedule}), "device")
            order = (few, resident) if number % 2 else (resident, few)  # whoever goes second has the warmer caches
            seen = {client: await _round(setting, schedule, client) for client in order}
            pair = (seen[few], seen[resident])
            print(f"{'warm-up' if number < 0 else f'round {number + 1}'}  {_line(*pair)}", flush=True)
            if number >= 0:
                rounds.append(pair)
    return rounds


def drawn(names: Sequence[str], count: int) -> list[str]:
    """Draws of Zipf 1.0, one after the other."""
    shares = 1 / np.arange(1, len(names) + 1)
    chosen: list[str] = np.random.default_rng(0).choice(names, size=count, p=shares / shares.sum()).tolist()
    return chosen


async def load(client: httpx.AsyncClient, names: Iterable[str], tier: str) -> None:
    """Load them in this order, a few at once. Raises `httpx.HTTPStatusError` when one cannot be."""
    upcoming = iter(names)

    async def work() -> None:
        for name in upcoming:
            (await client.post(f"/v1/adapters/{name}/load", json={"tier": tier})).raise_for_status()

    async with asyncio.TaskGroup() as group:
        for _ in range(LOADS_AT_ONCE):
            group.create_task(work())


async def _round(setting: Setting, schedule: list[Planned], client: httpx.AsyncClient) -> Round:
    clock = Clock()
    records = await send(scenario(setting), schedule, client, clock)
    return summarize(records, clock())


def summarize(records: Sequence[Record], seconds: float) -> Round:
    firsts = [r.first_token_s - r.scheduled_s for r in records if r.first_token_s is not None] or [0.0]
    p50, p99 = np.percentile(firsts, [50, 99]).tolist()
    tokens = sum(record.output_tokens for record in records)
    return Round(tokens / seconds, p50, p99, [record.error for record in records if record.error is not None])


def _line(few: Round, resident: Round) -> str:
    ratio = few.tokens_per_s / resident.tokens_per_s
    return f"{_side(few)}; all resident {_side(resident)}: {ratio:.3f}"


def _side(seen: Round) -> str:
    return (
        f"{seen.tokens_per_s:.1f} tok/s, first token p50 {seen.ttft_p50_s:.2f} p99 {seen.ttft_p99_s:.2f} s, "
        f"{len(seen.errors)} failed"
    )


def report(setting: Setting, rounds: Sequence[tuple[Round, Round]], target: float = 0.8) -> bool:
    ratios = [few.tokens_per_s / resident.tokens_per_s for few, resident in rounds]
    errors = [error for pair in rounds for side in pair for error in side.errors]
    median = float(np.median(ratios))
    print(
        f"{setting.adapters} adapters of rank {setting.rank} on {setting.slots} slots, {setting.streams} streams: "
        f"{median:.3f} of the throughput with all resident "
        f"(rounds {min(ratios):.3f} to {max(ratios):.3f}, target {target}), failed: {errors or 'none'}"
    )
    return median >= target and not errors

"""Who waits for whom, over HTTP: `python -m load_tests.sharing starvation` and `… fairness`.

Starvation: one device slot, and streams that ask for adapter A one after the other without end; one request for B. It
must start within the configured number of steps of being passed over, and what A's running answers take by then.
Fairness: a tenant that sends ten times as much as another, more than the server can do, beside the other alone. Both
rounds send the light one's same requests, open loop.
"""

import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np

from load_tests.client import Clock, Record, complete, new_client
from load_tests.command import Kind, run_kind
from load_tests.own_server import serving
from load_tests.residency.filling import fill, template, variants
from load_tests.runner import models, send
from load_tests.scenarios import Bounds, Lognormal, Models, Poisson, Scenario, Slo
from load_tests.schedule import WORDS, Planned, build
from tests.fixtures.api_server import secret

TIMEOUT_S = 120.0
FACTOR = 1.5
TIMES = 10  # what the heavy tenant sends to the light one's
KEYS = f"""
[[keys]]
name = "heavy"
key = "{secret("heavy")}"
[[keys]]
name = "light"
key = "{secret("light")}"
"""


class Starvation(msgspec.Struct, frozen=True):
    bound: int = 64  # --max-wait-steps
    streams: int = 8
    new_tokens: int = 48  # of A's longest answers
    trials: int = 5


class Fairness(msgspec.Struct, frozen=True):
    rows: int = 4  # --max-num-seqs
    seconds: int = 90
    per_minute: int = 20  # requests of the light tenant
    rounds: int = 2


# -- starvation --------------------------------------------------------------------------------------------------------


def starvation(setting: Starvation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        versions = variants(template(Path(folder), 16), Path(folder) / "versions", 2)
        a, b = fill(Path(folder) / "data", versions)
        flags = ("--max-adapter-rank", "16", "--adapter-slots", "1", "--max-wait-steps", str(setting.bound))
        with serving(Path(folder) / "data", *flags) as url:
            waited = asyncio.run(_starve(setting, url, a, b))
    return report_starvation(setting, waited)


async def _starve(setting: Starvation, url: str, a: str, b: str) -> list[int]:
    """The steps from when B was asked for to its first token, by trial."""
    async with new_client(url, None) as client:
        endless = [asyncio.create_task(_endless(client, a, setting.new_tokens, n)) for n in range(setting.streams)]
        waited = []
        for _ in range(setting.trials):
            await asyncio.sleep(5.0)  # A has the slot again, and all its streams run
            before = await _steps(client)
            await _ask(client, b, 1)
            waited.append(await _steps(client) - before)
            print(f"B's first token after {waited[-1]} steps", flush=True)
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        return waited


async def _endless(client: httpx.AsyncClient, model: str, new_tokens: int, seed: int) -> None:
    """Answers of many lengths: there is no moment when all streams are between two of them."""
    lengths = random.Random(seed)
    while True:
        await _ask(client, model, lengths.randint(new_tokens // 4, new_tokens))


async def _ask(client: httpx.AsyncClient, model: str, new_tokens: int) -> Record:
    clock = Clock()
    planned = Planned(0.0, model, "adapter", " ".join(WORDS[:16]), new_tokens)
    record = await complete(client, "completions", planned, clock, scheduled_s=clock(), timeout_s=TIMEOUT_S)
    if record.error is not None:
        raise RuntimeError(f"a request for {model} failed: {record.error}")
    return record


async def _steps(client: httpx.AsyncClient) -> int:
    """Engine steps since the server started."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("loraplex_engine_step_seconds_count"))


def report_starvation(setting: Starvation, waited: Sequence[int]) -> bool:
    """Past the bound nobody who came later starts; A's answers that run by then are let finish, with their prefill."""
    allowed = setting.bound + setting.new_tokens + setting.streams
    print(f"B waited {min(waited)} to {max(waited)} steps; bound {setting.bound}, with A's answers {allowed}")
    return max(waited) <= allowed


# -- fairness ----------------------------------------------------------------------------------------------------------


def fairness(setting: Fairness) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text(KEYS)
        flags = ("--keys-file", str(keys), "--max-num-seqs", str(setting.rows), "--max-queue", "2000")
        with serving(Path(folder) / "data", *flags) as url:
            rounds = asyncio.run(_share(setting, url))
    return report_fairness(rounds)


async def _share(setting: Fairness, url: str) -> list[tuple[list[Record], list[Record]]]:
    """The light tenant's requests alone and beside the heavy one's, by round."""
    rounds = []
    async with new_client(url, secret("light")) as light, new_client(url, secret("heavy")) as heavy:
        await _send(setting, light, 1.0, seed=99)  # warms up
        for seed in range(setting.rounds):
            alone = await _send(setting, light, 1.0, seed)
            crowd = asyncio.create_task(_send(setting, heavy, TIMES, seed + 100))
            beside = await _send(setting, light, 1.0, seed)
            crowd.cancel()  # what is still in its queue
            await asyncio.gather(crowd, return_exceptions=True)
            rounds.append((alone, beside))
            print(f"round {seed + 1}  {_times(alone)} alone, {_times(beside)} beside", flush=True)
    return rounds


async def _send(setting: Fairness, client: httpx.AsyncClient, times: float, seed: int) -> list[Record]:
    traffic = scenario(setting, times)
    base, _ = await models(client)
    schedule = build(traffic, base, [], seed=seed)
    clock = Clock()
    clock.start()
    return await send(traffic, schedule, client, clock)


def scenario(setting: Fairness, times: float) -> Scenario:
    return Scenario(
        name="tenant",
        description="one tenant's traffic",
        arrivals=Poisson(rate=times * setting.per_minute / 60),
        models=Models("uniform", base_share=1.0),
        prompt_tokens=Lognormal(median=32, sigma=0.5, low=8, high=128),
        output_tokens=Lognormal(median=32, sigma=0.5, low=8, high=96),
        bounds=Bounds(duration_s=setting.seconds, max_requests=10_000, request_timeout_s=TIMEOUT_S),
        slo=Slo(ttft_s=2.0, itl_s=0.4),
    )


def latency_p95_s(records: Sequence[Record]) -> float:
    """From the scheduled time to the last token."""
    if failed := [record.error for record in records if record.error is not None]:
        raise RuntimeError(f"requests of the light tenant failed: {failed}")
    return float(np.percentile([r.last_token_s - r.scheduled_s for r in records if r.last_token_s is not None], 95))


def _times(records: Sequence[Record]) -> str:
    p95 = latency_p95_s(records)
    firsts = [r.first_token_s - r.scheduled_s for r in records if r.first_token_s is not None]
    gaps = [gap for record in records for gap in record.gaps_s]
    first, gap = np.percentile(firsts, 95), np.median(gaps) * 1000
    return f"p95 {p95:.2f} s (first token p95 {first:.2f} s, {gap:.0f} ms between tokens)"


def report_fairness(rounds: Sequence[tuple[list[Record], list[Record]]]) -> bool:
    ratios = [latency_p95_s(beside) / latency_p95_s(alone) for alone, beside in rounds]
    ratio = float(np.median(ratios))
    print(f"the light tenant's p95 latency is {ratio:.2f} times what it is alone (target {FACTOR})")
    return ratio <= FACTOR


KINDS = {
    "starvation": Kind(starvation, Starvation, "when a request for B starts beside endless traffic for A"),
    "fairness": Kind(fairness, Fairness, "latency beside a tenant that sends ten times as much"),
}

if __name__ == "__main__":
    run_kind("python -m load_tests.sharing", KINDS)

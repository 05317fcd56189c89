"""How long the tokens of running streams pause while other adapters are loaded.

Rounds without loads and rounds with them take turns on one server. Every stream decodes for an adapter of its own that
is resident, nobody prefills. The largest gap with loads may be 1.5 times the p99 without, and 20 ms.
"""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import httpx
import msgspec
import numpy as np

from load_tests.client import Clock, Record, complete, new_client
from load_tests.own_server import serving
from load_tests.residency.filling import fill, template, variants
from load_tests.residency.traffic import load
from load_tests.schedule import WORDS, Planned

TIMEOUT_S = 120.0
SETTLED_S = 2.0  # after which every stream has had its first token, and loads begin
FACTOR, SLACK_S = 1.5, 0.020


class Setting(msgspec.Struct, frozen=True):
    loads: int = 100
    streams: int = 8
    rank: int = 16
    new_tokens: int = 320
    rounds: int = 10


class Seen(msgspec.Struct, frozen=True):
    """Of one round, in seconds: the gaps between tokens, and how long the loads took."""

    gaps_s: list[float]
    loading_s: float


def run(setting: Setting) -> bool:
    """Print the rounds and the comparison; whether the target is met."""
    with tempfile.TemporaryDirectory() as folder:
        count = setting.streams + setting.loads
        versions = variants(template(Path(folder), setting.rank), Path(folder) / "versions", count)
        names = fill(Path(folder) / "data", versions)
        flags = ("--max-adapter-rank", str(setting.rank), "--adapter-slots", str(4 * setting.streams))
        with serving(Path(folder) / "data", *flags) as url:
            quiet, loaded = asyncio.run(_measure(setting, names, url))
    return report(quiet, loaded)


async def _measure(setting: Setting, names: list[str], url: str) -> tuple[list[Seen], list[Seen]]:
    quiet, loaded = [], []
    own, others = names[: setting.streams], names[setting.streams :]
    share = len(others) // setting.rounds
    async with new_client(url, None) as client:
        await _round(setting, client, own, [])  # warms up
        for number in range(setting.rounds):
            quiet.append(await _round(setting, client, own, []))
            loaded.append(await _round(setting, client, own, others[number * share : (number + 1) * share]))
            print(f"round {number + 1}  without loads {line(quiet[-1])}; with {line(loaded[-1])}", flush=True)
    return quiet, loaded


async def _round(setting: Setting, client: httpx.AsyncClient, own: list[str], others: list[str]) -> Seen:
    """The gaps from when all streams decode to when the first ends; with `others`, those while they are loaded."""
    clock = Clock()
    streams = [asyncio.create_task(_stream(client, name, setting, clock)) for name in own]
    await asyncio.sleep(SETTLED_S)
    started = clock()
    await load(client, others, "device")
    ended = clock()
    records = await asyncio.gather(*streams)
    if failed := [record.error for record in records if record.error is not None]:
        raise RuntimeError(f"streams failed: {failed}")
    if others and ended > decoding(records)[1]:
        raise RuntimeError("the streams were over before the loads: give them more tokens")
    return Seen(list(gaps(records, *((started, ended) if others else decoding(records)))), ended - started)


async def _stream(client: httpx.AsyncClient, name: str, setting: Setting, clock: Clock) -> Record:
    planned = Planned(0.0, name, "adapter", " ".join(WORDS[:32]), setting.new_tokens)
    return await complete(client, "completions", planned, clock, scheduled_s=clock(), timeout_s=TIMEOUT_S)


def token_times(record: Record) -> list[float]:
    assert record.first_token_s is not None
    return list(accumulate(record.gaps_s, initial=record.first_token_s))


def decoding(records: Sequence[Record]) -> tuple[float, float]:
    """From the last stream's second token, by when no gap has a prefill in it, to the first stream's last one."""
    times = [token_times(record) for record in records]
    return max(own[1] for own in times), min(own[-1] for own in times)


def gaps(records: Sequence[Record], since: float, until: float) -> Iterator[float]:
    """Those of all streams that overlap this time."""
    for record in records:
        for before, after in pairwise(token_times(record)):
            if after > since and before < until:
                yield after - before


def line(seen: Seen) -> str:
    p50, p99 = np.percentile(seen.gaps_s, [50, 99]) * 1000
    return f"p50 {p50:.0f} p99 {p99:.0f} max {max(seen.gaps_s) * 1000:.0f} ms ({seen.loading_s:.1f} s)"


def report(quiet: Sequence[Seen], loaded: Sequence[Seen]) -> bool:
    without, with_loads = (Seen([gap for seen in side for gap in seen.gaps_s], 0.0) for side in (quiet, loaded))
    bound = FACTOR * float(np.percentile(without.gaps_s, 99)) + SLACK_S
    largest = max(with_loads.gaps_s)
    print(f"without loads {line(without)}; with {line(with_loads)}")
    print(f"largest gap with loads {largest * 1000:.0f} ms, bound {bound * 1000:.0f} ms")
    return largest <= bound

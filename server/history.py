"""The last hour in numbers: a point every few seconds, which the console draws. The server keeps them, so that a page
shows the past as soon as it is opened."""

import asyncio
import time
from collections import deque
from itertools import pairwise
from typing import NamedTuple

from server.ipc.client import EngineClient
from server.metrics import Metrics

INTERVAL_SECONDS = 5.0
_HOUR = 720  # points
_WINDOW = 12  # points: latencies are those of the last minute, since few requests end within one interval

# The metrics of the whole server: those by adapter take milliseconds to sum up.
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
_TTFT, _ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
_BATCH_ADAPTERS = "loraplex_batch_adapters"
Counts = dict[str, float]


class Point(NamedTuple):
    """Rates over the interval that ends at `time` (Unix seconds), latencies in seconds over the last minute, and gauges
    at that time."""

    time: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p50: float | None
    itl_p95: float | None
    running: int
    waiting: int
    kv_cache_usage: float
    batch_adapters: float | None  # the 95th percentile of the distinct adapters in a step


class _Totals(NamedTuple):
    time: float  # of the monotonic clock
    counters: tuple[float, ...]
    histograms: dict[str, Counts]


class History:
    """The points of the last hour."""

    def __init__(self, engine: EngineClient, metrics: Metrics):
        self._engine = engine
        self._metrics = metrics
        self.points: deque[Point] = deque(maxlen=_HOUR)
        self._totals = deque([self._read()], maxlen=_WINDOW + 1)

    async def follow(self) -> None:
        """Add a point every interval, until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self.add_point()

    def add_point(self) -> None:
        before, now, stats = self._totals[-1], self._read(), self._engine.stats
        self._totals.append(now)
        seconds = max(now.time - before.time, 1e-3)
        output, prompt = ((b - a) / seconds for a, b in zip(before.counters, now.counters, strict=True))
        self.points.append(
            Point(
                time=time.time(),
                tokens_per_second=output,
                prompt_tokens_per_second=prompt,
                ttft_p50=self._quantile(_TTFT, 0.5),
                ttft_p95=self._quantile(_TTFT, 0.95),
                itl_p50=self._quantile(_ITL, 0.5),
                itl_p95=self._quantile(_ITL, 0.95),
                running=stats.running,
                waiting=stats.waiting,
                kv_cache_usage=stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
                batch_adapters=self._quantile(_BATCH_ADAPTERS, 0.95),
            )
        )

    def _read(self) -> _Totals:
        counters = tuple(self._metrics.summed(name).get("", 0.0) for name in _COUNTERS)
        histograms = {name: self._metrics.summed(name) for name in (_TTFT, _ITL, _BATCH_ADAPTERS)}
        return _Totals(time.monotonic(), counters, histograms)

    def _quantile(self, name: str, q: float) -> float | None:
        old, new = self._totals[0].histograms[name], self._totals[-1].histograms[name]
        return quantile({bound: count - old.get(bound, 0.0) for bound, count in new.items()}, q)


def quantile(cumulative: Counts, q: float) -> float | None:
    """Return the q-quantile of a histogram of cumulative counts by upper bound, interpolated within its bucket as
    Prometheus does; None without observations."""
    buckets = sorted((float(bound), count) for bound, count in cumulative.items())
    if not buckets or buckets[-1][1] <= 0:
        return None
    wanted = q * buckets[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= wanted:
            return (
                low
                if high == float("inf") or count <= below
                else low + (high - low) * (wanted - below) / (count - below)
            )
    return None

"""The last hour in numbers: a point every few seconds, which the console draws. The server keeps them, so that a page
shows the past as soon as it is opened."""

import asyncio
import time
from collections import deque
from typing import NamedTuple

from server.ipc.client import EngineClient
from server.totals import Totals

INTERVAL_SECONDS = 5.0
_HOUR = 720  # points
_WINDOW = 12  # points: latencies are those of the last minute, since few requests end within one interval


class Point(NamedTuple):
    """Rates over the interval that ends at `time` (Unix seconds), latencies in seconds over the last minute, and gauges
    at that time."""

    time: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    requests_per_second: float
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p50: float | None
    itl_p95: float | None
    running: int
    waiting: int
    kv_cache_usage: float
    batch_adapters: float | None  # the 95th percentile of the distinct adapters in a step


class History:
    """The points of the last hour."""

    def __init__(self, engine: EngineClient, totals: Totals):
        self._engine = engine
        self._totals = totals
        self.points: deque[Point] = deque(maxlen=_HOUR)
        self._earlier = deque([totals.snapshot()], maxlen=_WINDOW)  # one per interval, the latest last
        self._last = time.monotonic()

    async def follow(self) -> None:
        """Add a point every interval, until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self.add_point()

    def add_point(self) -> None:
        totals, before, minute_ago, stats = self._totals, self._earlier[-1], self._earlier[0], self._engine.stats
        seconds = max(time.monotonic() - self._last, 1e-3)
        self.points.append(
            Point(
                time=time.time(),
                tokens_per_second=(totals.output_tokens - before.output_tokens) / seconds,
                prompt_tokens_per_second=(totals.prompt_tokens - before.prompt_tokens) / seconds,
                requests_per_second=(totals.requests - before.requests) / seconds,
                ttft_p50=totals.first_tokens.quantile(0.5, minute_ago.first_tokens),
                ttft_p95=totals.first_tokens.quantile(0.95, minute_ago.first_tokens),
                itl_p50=totals.gaps.quantile(0.5, minute_ago.gaps),
                itl_p95=totals.gaps.quantile(0.95, minute_ago.gaps),
                running=stats.running,
                waiting=stats.waiting,
                kv_cache_usage=stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
                batch_adapters=totals.batch_adapters.quantile(0.95, minute_ago.batch_adapters),
            )
        )
        self._earlier.append(totals.snapshot())
        self._last = time.monotonic()

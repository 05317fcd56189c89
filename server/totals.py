"""Sums over all models since the server started, cheap enough to be kept for every token: the history is made of them."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

_LATENCIES = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_ADAPTERS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)


class Buckets:
    """Numbers of observations between `bounds`, which belong to the bucket below them; the last bucket has no bound."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1

    def quantile(self, q: float, since: Sequence[int]) -> float | None:
        """Return the q-quantile of the observations after the counts were `since`, interpolated within its bucket as
        Prometheus does; None without observations. Beyond the last bound nothing is known, so it is the most."""
        new = [count - old for count, old in zip(self.counts, since, strict=True)]
        wanted, below, low = q * sum(new), 0, 0.0
        if not wanted:
            return None
        for high, count in zip(self.bounds, new, strict=False):
            if below + count >= wanted:
                return low + (high - low) * (wanted - below) / count
            below, low = below + count, high
        return low


class Snapshot(NamedTuple):
    output_tokens: int
    prompt_tokens: int
    requests: int
    first_tokens: list[int]
    gaps: list[int]
    batch_adapters: list[int]


class Totals:
    """Running sums and distributions over all requests and steps."""

    def __init__(self) -> None:
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.requests = 0
        self.first_tokens = Buckets(_LATENCIES)
        self.gaps = Buckets(_LATENCIES)
        self.batch_adapters = Buckets(_ADAPTERS)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.output_tokens,
            self.prompt_tokens,
            self.requests,
            [*self.first_tokens.counts],
            [*self.gaps.counts],
            [*self.batch_adapters.counts],
        )

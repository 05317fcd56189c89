"""What arrives when: seeded requests of many adapters, drawn before the run."""

import math
import random
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import msgspec

BASE = -1


class Request(NamedTuple):
    arrival: float  # seconds
    adapter: int  # by popularity, 0 is the most popular; cold ones lie beyond the population; BASE: the base model
    tenant: str
    prompt_tokens: int
    output_tokens: int


class Lengths(msgspec.Struct, frozen=True):
    """Lognormal, cut at `longest`."""

    median: float
    sigma: float
    longest: int

    def draw(self, rng: random.Random) -> int:
        return min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), 1), self.longest)


class Workload(msgspec.Struct, frozen=True):
    """Poisson arrivals at a rate that may ramp up and burst. Equal workloads give equal requests."""

    requests: int = 10_000
    rate: float = 4.0  # requests per second, averaged over the run
    ramp: float = 0.0  # the rate grows linearly from (1 - ramp) to (1 + ramp) times its mean
    burst: float = 1.0  # in the first fifth of every minute the rate is that many times what it is outside
    adapters: int = 10_000
    zipf: float = 1.0  # the popularity of the n-th adapter is n ** -zipf
    tenants: tuple[tuple[str, float], ...] = (("all", 1.0),)  # name, share of the requests
    prompt: Lengths = Lengths(96, 0.6, 512)
    output: Lengths = Lengths(32, 0.6, 128)
    seed: int = 0


MINUTE, BURST_SHARE = 60.0, 0.2


def generate(load: Workload) -> list[Request]:
    rng = random.Random(load.seed)
    popularity = list(accumulate((n + 1) ** -load.zipf for n in range(load.adapters)))
    adapters = rng.choices(range(load.adapters), cum_weights=popularity, k=load.requests)
    names, shares = zip(*load.tenants, strict=True)
    tenants = rng.choices(names, shares, k=load.requests)
    return [
        Request(arrival, adapter, tenant, load.prompt.draw(rng), load.output.draw(rng))
        for arrival, adapter, tenant in zip(_arrivals(load, rng), adapters, tenants, strict=True)
    ]


def cold_burst(at: float, count: int, load: Workload, seconds: float = 1.0) -> list[Request]:
    """Requests for `count` adapters that nobody asked for before, evenly over `seconds`."""
    rng = random.Random(f"{load.seed} cold")
    return [
        Request(at + seconds * n / count, load.adapters + n, "cold", load.prompt.draw(rng), load.output.draw(rng))
        for n in range(count)
    ]


def merged(*parts: list[Request]) -> list[Request]:
    return sorted((request for part in parts for request in part), key=lambda request: request.arrival)


def ranks(num_adapters: int, seed: int = 0) -> list[int]:
    """The LoRA rank of each adapter: most are small, as on the hubs."""
    return random.Random(f"{seed} ranks").choices((8, 16, 32, 64), (3, 4, 2, 1), k=num_adapters)


def _arrivals(load: Workload, rng: random.Random) -> Iterator[float]:
    """A Poisson process of varying rate, by thinning (Lewis and Shedler, 1979)."""
    quiet = load.rate / (1 + BURST_SHARE * (load.burst - 1))
    length = load.requests / load.rate
    highest = quiet * max(load.burst, 1.0) * (1 + load.ramp)
    now, left = 0.0, load.requests
    while left:
        now += rng.expovariate(highest)
        in_burst = now % MINUTE < BURST_SHARE * MINUTE
        rate = quiet * (load.burst if in_burst else 1.0) * (1 + load.ramp * min(2 * now / length - 1, 1.0))
        if rng.random() * highest < rate:
            yield now
            left -= 1

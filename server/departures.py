"""How quickly sequences have left the queue lately, from which `Retry-After` follows. Knows no HTTP and no engine."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal, NamedTuple

Clock = Callable[[], float]
Unit = Literal["sequences", "prompt tokens"]

WINDOW = 30.0  # busy seconds that count
SHORTEST_MEASUREMENT = 1.0  # busy seconds; after less, nothing is known
UNKNOWN_WAIT, LONGEST_WAIT = 2, 120  # seconds


class _Departure(NamedTuple):
    at: float
    tenant: str
    tokens: int


class Departures:
    """The sequences that left the queue, in busy time: the time during which any waited. Idle time does not make a
    server look slow."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._busy, self._busy_since = 0.0, math.nan  # before the present busy time, and its start (NaN: idle)
        self._recent: deque[_Departure] = deque()
        self._sums: dict[Unit, Counter[str]] = {"sequences": Counter(), "prompt tokens": Counter()}

    def begin_busy(self) -> None:
        if math.isnan(self._busy_since):
            self._busy_since = self._clock()

    def end_busy(self) -> None:
        self._busy, self._busy_since = self._now(), math.nan

    def add(self, tenant: str, tokens: int) -> None:
        self._recent.append(departure := _Departure(self._now(), tenant, tokens))
        self._count(departure, 1)
        self._forget_old()

    def seconds(self, amount: float, unit: Unit, tenant: str | None = None) -> int:
        """Return in how many seconds `amount` more of `tenant` (None: of all) will have left, at the rate of late."""
        self._forget_old()
        measured = min(self._now(), WINDOW)
        if measured < SHORTEST_MEASUREMENT:
            return UNKNOWN_WAIT
        sums = self._sums[unit]
        left = sums.total() if tenant is None else sums[tenant]
        return min(max(math.ceil(round(amount * measured / max(left, 1), 3)), 1), LONGEST_WAIT)

    def _now(self) -> float:
        return self._busy + (0.0 if math.isnan(self._busy_since) else self._clock() - self._busy_since)

    def _forget_old(self) -> None:
        while self._recent and self._recent[0].at < self._now() - WINDOW:
            self._count(self._recent.popleft(), -1)

    def _count(self, departure: _Departure, sign: int) -> None:
        amounts: dict[Unit, int] = {"sequences": 1, "prompt tokens": departure.tokens}
        for unit, amount in amounts.items():
            sums = self._sums[unit]
            sums[departure.tenant] += sign * amount
            if not sums[departure.tenant]:
                del sums[departure.tenant]

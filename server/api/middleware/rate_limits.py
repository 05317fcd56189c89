"""Limits on the use of a key or an adapter: concurrent requests, requests per minute, tokens per minute."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from server.api.errors import ApiError

Clock = Callable[[], float]
_UNKNOWN_WAIT = 1.0  # seconds; the end of a running request is not predictable
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one key or adapter; 0 means no limit."""

    max_concurrent: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


class Bucket:
    """A token bucket that refills at `per_minute` and holds as much. Its level may become negative."""

    def __init__(self, per_minute: int, clock: Clock):
        self._capacity = self._level = float(per_minute)
        self._clock = clock
        self._updated = clock()

    def wait(self, amount: float) -> float:
        """Return the seconds until min(amount, capacity) tokens are available; any excess is borrowed."""
        self._refill()
        missing = min(amount, self._capacity) - self._level
        return missing * 60 / self._capacity if missing > _ROUNDING else 0.0

    def take(self, amount: float) -> None:
        self._refill()
        self._level -= amount

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._updated) * self._capacity / 60)
        self._updated = now


class Refusal(NamedTuple):
    seconds: float
    limit: str  # a noun phrase for the error message


class Meter:
    """Usage of one key or one adapter."""

    def __init__(self, owner: str, limits: Limits, clock: Clock):
        self.owner = owner  # a noun phrase for the error message
        self._limits = limits
        self._running = 0
        self._requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None

    def refusal(self, tokens: int) -> Refusal | None:
        """Return the limit that delays a request with `tokens` prompt tokens the longest; None if it may begin."""
        limits, found = self._limits, []
        if limits.max_concurrent and self._running >= limits.max_concurrent:
            found.append(Refusal(_UNKNOWN_WAIT, f"{limits.max_concurrent} concurrent requests"))
        if self._requests is not None and (wait := self._requests.wait(1)):
            found.append(Refusal(wait, f"{limits.requests_per_minute} requests per minute"))
        if self._tokens is not None and (wait := self._tokens.wait(tokens)):
            found.append(Refusal(wait, f"{limits.tokens_per_minute} tokens per minute"))
        return max(found, default=None)

    def refusal_by_rate(self) -> Refusal | None:
        """Return the limit of requests per minute if it delays a request now."""
        wait = self._requests.wait(1) if self._requests is not None else 0.0
        return Refusal(wait, f"{self._limits.requests_per_minute} requests per minute") if wait else None

    def count_refused(self) -> None:
        if self._requests is not None:
            self._requests.take(1)

    def begin(self, tokens: int) -> None:
        self._running += 1
        if self._requests is not None:
            self._requests.take(1)
        self.use(tokens)

    def use(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)

    def end(self) -> None:
        self._running -= 1


class Lease:
    """One request's use of its limits. `close` ends it and may be called twice."""

    def __init__(self, meters: Iterable[Meter] = ()):
        self._meters = list(meters)
        self._open = True

    def generated(self, tokens: int) -> None:
        for meter in self._meters:
            meter.use(tokens)

    def close(self) -> None:
        for meter in self._meters if self._open else ():
            meter.end()
        self._open = False


class RateLimits:
    """The meters of all keys and adapters that have limits.

    Prompt tokens are charged when the request begins, output tokens as they are generated, even if the level becomes
    negative. Reserving `max_tokens` instead would refuse requests for tokens that most of them never use, because a
    chat may use the whole context by default. As a consequence, concurrent requests can overdraw a bucket once.
    """

    def __init__(self, adapters: Limits, clock: Clock = time.monotonic):
        self._adapter_limits = adapters
        self._clock = clock
        self._keys: dict[tuple[str, Limits], Meter] = {}  # a key whose limits change starts anew
        self._adapters: dict[str, Meter] = {}

    def check_request(
        self, key_id: str, limits: Limits, adapters: Iterable[str], prompt_tokens: int = 0
    ) -> list[Meter]:
        """Return the meters of a request. Raises 429 if the request cannot begin now."""
        meters = self._meters(key_id, limits, adapters)
        found = [(refusal, meter) for meter in meters if (refusal := meter.refusal(prompt_tokens)) is not None]
        if found:
            refusal, meter = max(found, key=lambda pair: pair[0])
            raise _too_many(meter.owner, refusal)
        return meters

    def begin_request(self, key_id: str, limits: Limits, adapters: Iterable[str], prompt_tokens: int) -> Lease:
        """Begin a request and charge its prompt. Raises 429 without charging any meter."""
        meters = self.check_request(key_id, limits, adapters, prompt_tokens)
        for meter in meters:
            meter.begin(prompt_tokens)
        return Lease(meters)

    def check_rate(self, key_id: str, limits: Limits) -> None:
        """Raise 429 if the key has made its requests of this minute, before anything of the request is read."""
        for meter in self._meters(key_id, limits, ()):
            if (refusal := meter.refusal_by_rate()) is not None:
                raise _too_many(meter.owner, refusal)

    def count_refused(self, key_id: str, limits: Limits) -> None:
        """Charge the key for a request that was refused before it began."""
        for meter in self._meters(key_id, limits, ()):
            meter.count_refused()

    def forget(self, adapter: str) -> None:
        self._adapters.pop(adapter, None)

    def _meters(self, key_id: str, limits: Limits, adapters: Iterable[str]) -> list[Meter]:
        meters = []
        if limits != Limits():
            meters.append(self._keys.setdefault((key_id, limits), Meter("this key", limits, self._clock)))
        if self._adapter_limits != Limits():
            for name in adapters:
                # Without its name: an alias may have members that the key must not know.
                new = Meter("the requested adapter", self._adapter_limits, self._clock)
                meters.append(self._adapters.setdefault(name, new))
        return meters


def _too_many(owner: str, refusal: Refusal) -> ApiError:
    seconds = max(1, math.ceil(refusal.seconds))
    message = f"The limit of {refusal.limit} for {owner} is reached; try again in {seconds} s."
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})

"""Time in tests. A bound of real time only ends a hang, and no busy machine reaches it; speed is processor time, or a
ratio to other work of the same moment; and what depends on a clock is given one that moves when the test says so."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HANG_SECONDS = 600.0  # the longest wait of the suite, an engine's start, takes 10 s on a quiet machine


def patience(what: str) -> Iterator[None]:
    """Rounds for a loop that waits and leaves by itself. Fails with `what` once it hangs."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        yield
    raise AssertionError(f"{what} did not happen within {HANG_SECONDS:g} s")


def wait_for(condition: Callable[[], object], what: str) -> float:
    """Poll until `condition()` is true; returns how long it took."""
    started = time.monotonic()
    for _ in patience(what):
        if condition():
            break
        time.sleep(0.01)
    return time.monotonic() - started


async def eventually(condition: Callable[[], object], what: str = "it") -> float:
    """Poll as `wait_for` does, and let the event loop go on meanwhile."""
    started = time.monotonic()
    for _ in patience(what):
        if condition():
            break
        await asyncio.sleep(0.001)
    return time.monotonic() - started


@dataclass
class Clock:
    """A clock that stands still unless the test moves `now`; also in the place of a module's `time`."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def leap(seconds: float) -> None:
    """Move the running event loop's clock ahead: timeouts and sleeps that end by then end now."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


def cpu_seconds(work: Callable[[], object], attempts: int = 3) -> float:
    """The least processor time of this process that an attempt at `work` takes: other programs add little to it."""
    taken = []
    for _ in range(attempts):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)

"""Virtual time, and an executor whose jobs take some of it."""

import heapq
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any


@dataclass(slots=True)
class Clock:
    now: float = 0.0  # seconds


@dataclass(order=True, slots=True)
class _Job:
    end: float
    number: int  # jobs that end together run in order of submission
    future: "Future[Any]" = field(compare=False)
    work: Callable[[], Any] = field(compare=False)


class VirtualExecutor(Executor):
    """As many virtual threads as told, first come, first served. A job's work is done when the clock passes its end.

    `seconds(*args)` says how long the job with these arguments takes.
    """

    def __init__(self, clock: Clock, threads: int, seconds: Callable[..., float]) -> None:
        self._clock = clock
        self._seconds = seconds
        self._idle_from = [0.0] * threads
        self._jobs: list[_Job] = []
        self._numbers = count()

    # A Future and nothing narrower: callers of the threads' executor get one as well, and may cancel it.
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        start = max(self._clock.now, heapq.heappop(self._idle_from))
        end = start + self._seconds(*args, **kwargs)
        heapq.heappush(self._idle_from, end)
        future: Future[Any] = Future()
        heapq.heappush(self._jobs, _Job(end, next(self._numbers), future, lambda: fn(*args, **kwargs)))
        return future

    def next_end(self) -> float | None:
        """When the next job ends; None when there is none."""
        return self._jobs[0].end if self._jobs else None

    def run_due(self) -> None:
        """Do the work of the jobs that have ended by now."""
        while self._jobs and self._jobs[0].end <= self._clock.now:
            job = heapq.heappop(self._jobs)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(job.work())

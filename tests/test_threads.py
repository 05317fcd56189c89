"""The number of the model's threads follows what they lose to other programs, and what the cores have to spare."""

import os
from collections.abc import Iterator

import pytest
import torch

from server.engine import threads
from server.engine.threads import INTERVAL, LONGEST_PATIENCE, AdaptiveThreads, ThreadCount, Usage, adaptive_threads
from tests.fixtures.native_forms import native

__all__ = ["native"]
QUIET = Usage(clock=0.25, waited=0.01, idle=0.02)
CONTENDED = Usage(clock=0.25, waited=0.2, idle=0.0)
SPARE = Usage(clock=0.25, waited=0.0, idle=0.24)  # one core of the process's own has nothing to run


def counts(of: ThreadCount, *intervals: Usage) -> list[int]:
    return [of.after(interval) for interval in intervals]


def test_quiet_cores_keep_all_threads() -> None:
    assert counts(ThreadCount(4), *[QUIET] * 100) == [4] * 100


def test_contended_cores_lose_a_thread_at_a_time_and_keep_one() -> None:
    assert counts(ThreadCount(3), *[CONTENDED] * 4) == [2, 1, 1, 1]


def test_a_thread_that_runs_without_waiting_is_kept_while_no_core_is_idle() -> None:
    assert counts(ThreadCount(2), CONTENDED, *[QUIET] * 20) == [1] * 21


def test_cores_that_become_idle_get_a_thread_again() -> None:
    assert counts(ThreadCount(3), CONTENDED, CONTENDED, SPARE, QUIET, SPARE, QUIET) == [2, 1, 2, 2, 3, 3]


def test_a_thread_that_is_taken_back_at_once_waits_twice_as_long_for_its_next_try() -> None:
    count = ThreadCount(2)
    counts(count, CONTENDED)
    tries = []
    for _ in range(9):
        waits = 1
        while count.after(SPARE) == 1:
            waits += 1
        tries.append(waits)
        assert count.after(CONTENDED) == 1
    assert tries == [1, 2, 4, 8, 16, 32, LONGEST_PATIENCE, LONGEST_PATIENCE, LONGEST_PATIENCE]


def test_after_a_try_that_held_the_next_one_comes_sooner() -> None:
    count = ThreadCount(2)
    counts(count, CONTENDED, SPARE, CONTENDED, SPARE, SPARE)
    assert count.count == 2 and count.after(QUIET) == 2  # the second try holds
    assert counts(count, CONTENDED, SPARE) == [1, 2]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("native", "two_threads")
def test_torch_uses_as_many_threads_as_were_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock)
    adaptive = AdaptiveThreads()
    decisions = iter([1, 1, 2])
    monkeypatch.setattr(adaptive._count, "after", lambda _: next(decisions))
    used = []
    for _ in range(3):
        clock += INTERVAL
        adaptive.adapt(INTERVAL)
        used.append(torch.get_num_threads())
    assert used == [1, 1, 2]


@pytest.mark.usefixtures("native", "two_threads")
def test_an_engine_without_work_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock)
    adaptive = AdaptiveThreads()
    monkeypatch.setattr(adaptive._count, "after", lambda _: pytest.fail("it was idle"))
    clock += 10 * INTERVAL
    adaptive.adapt(INTERVAL)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("native", "two_threads")
def test_the_kernel_tells_what_the_threads_waited() -> None:
    usage = AdaptiveThreads()._usage()
    assert usage.waited >= 0 and usage.idle >= 0


def test_a_device_and_a_single_thread_are_left_alone() -> None:
    assert adaptive_threads("cuda")(1.0) is None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    adaptive_threads("cpu")(100.0)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)

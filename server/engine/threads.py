"""The number of threads that compute a step of the model on a CPU: as many as there are cores, and fewer while other
programs keep some of the cores busy.

The threads of a step wait for each other hundreds of times. Beside one busy program, a thread that shares its core runs
half of the time and all others wait for it, so that a step takes several times as long. With one thread fewer, the
program has a core and each of the remaining threads has its own.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.device.forms import NativeUnavailable
from server.engine.machine import available_cpus, cpu_quota
from server.model.cpu.library import thread_ids

INTERVAL = 0.25  # seconds over which the threads are watched
LOST_CORE = 0.45  # of a core's time that threads have to wait for a core, from which on one thread fewer is faster
IDLE_CORE = 0.8  # of a core's time that nobody uses, from which on there is room for one thread more
LONGEST_PATIENCE = 40  # intervals of room before a thread is added again


READER_NICE = 10  # of the thread that reads adapters beside a step on the same cores
log = logging.getLogger(__name__)


def set_threads(threads: int) -> None:
    """Set the number of the model's threads. Where it was left open, there are none that a CPU quota cannot keep busy:
    threads that wait for each other use it up, and then they all stand still until the next period."""
    if threads:
        torch.set_num_threads(threads)
    elif cpu_quota() < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cpus(torch.get_num_threads()))
        log.info("threads of the model: %d, as the CPU quota is %.2f cores", torch.get_num_threads(), cpu_quota())


def stay_single_threaded() -> None:
    """A reader thread that ran parallel torch code would get OpenMP workers of its own. With more workers than cores
    libgomp no longer spins between parallel regions, and every step of the model takes almost twice as long. Nor does
    it keep to the core that the engine's thread is bound to."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))  # the parent is not bound


def step_aside() -> None:
    """On a CPU a reader also takes cores from the step, each of whose parallel regions waits for its slowest thread."""
    stay_single_threaded()
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICE)


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds as the kernel counts them, of the clock, of the model's threads and of the cores: `waited` is what the
    threads together waited for a core, `idle` what the cores that the process may use had to spare together."""

    clock: float
    waited: float
    idle: float

    def since(self, before: "Usage") -> "Usage":
        return Usage(self.clock - before.clock, self.waited - before.waited, self.idle - before.idle)


class ThreadCount:
    """Decides on the number of threads, from 1 to `most`, by what each interval shows."""

    def __init__(self, most: int) -> None:
        self.count = self._most = most
        self._patience = 1  # intervals with room that have to follow each other before a thread is added
        self._with_room = 0
        self._is_new = False  # whether the last interval added a thread

    def after(self, interval: Usage) -> int:
        """The number of threads for the next interval."""
        lost = interval.waited / interval.clock
        has_room = interval.idle / interval.clock >= IDLE_CORE
        self._with_room = self._with_room + 1 if has_room else 0
        if lost >= LOST_CORE and self.count > 1:
            self._remove()
        elif self.count < self._most and self._with_room >= self._patience:
            self.count, self._with_room, self._is_new = self.count + 1, 0, True
        elif self._is_new:  # the added thread has its core
            self._is_new, self._patience = False, max(1, self._patience // 2)
        return self.count

    def _remove(self) -> None:
        """A thread that had to be taken back at once was added too early: the next one waits longer."""
        self._patience = min(2 * self._patience, LONGEST_PATIENCE) if self._is_new else 1
        self.count, self._with_room, self._is_new = self.count - 1, 0, False


class AdaptiveThreads:
    """Sets how many threads torch and the native code use. `adapt` is called after every step, by the thread that takes
    the steps."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._count = ThreadCount(self._most)
        self._cores = {thread: os.sched_getaffinity(thread) for thread in thread_ids(self._most)}
        self._watch()

    def adapt(self, step_seconds: float) -> None:
        """Count a step, and at the end of an interval decide on the threads of the next."""
        self._busy += step_seconds
        elapsed = time.monotonic() - self._before.clock
        if elapsed < INTERVAL:
            return
        if self._busy > elapsed / 2:  # without work there is nothing to see
            self._use(self._count.after(self._usage().since(self._before)))
        self._watch()

    def _use(self, count: int) -> None:
        if count == torch.get_num_threads():
            return
        torch.set_num_threads(count)
        everywhere = set().union(*self._cores.values())
        for thread in thread_ids(count):  # one that keeps to a core cannot leave it to others, but fewer than all must
            cores = self._cores.get(thread) if count == self._most else everywhere
            if cores:
                os.sched_setaffinity(thread, cores)

    def _watch(self) -> None:
        self._threads = [Path(f"/proc/self/task/{thread}/schedstat") for thread in thread_ids(torch.get_num_threads())]
        self._before, self._busy = self._usage(), 0.0

    def _usage(self) -> Usage:
        waited = sum(int(path.read_text().split()[1]) for path in self._threads) / 1e9
        return Usage(time.monotonic(), waited, _idle_seconds(set().union(*self._cores.values())))


def _idle_seconds(cores: set[int]) -> float:
    """Seconds that the cores together had nothing to run."""
    names = {f"cpu{core}" for core in cores}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = sum(int(words[4]) + int(words[5]) for words in lines if words[0] in names)  # idle, and waiting for disks
    return ticks / os.sysconf("SC_CLK_TCK")


def adaptive_threads(device: str) -> Callable[[float], None]:
    """`AdaptiveThreads.adapt`; it does nothing where there is one thread, or no kernel that tells how threads fare."""
    if device != "cpu" or sys.platform != "linux" or torch.get_num_threads() == 1:
        return lambda _: None
    try:
        return AdaptiveThreads().adapt
    except (NativeUnavailable, OSError, ValueError, IndexError):
        return lambda _: None

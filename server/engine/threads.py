"""The number of threads that compute a step on a CPU: one per core, and fewer while other programs keep cores busy.

The threads of a step synchronize hundreds of times. If one of them shares its core with a busy program, it runs half of
the time and all others wait for it, so a step takes several times as long. With one thread fewer, the program has a
core to itself and so has each remaining thread.
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
from server.engine.memory.machine import available_cpus, cpu_quota
from server.model.cpu.library import thread_ids

INTERVAL = 0.25  # seconds between two decisions
LOST_CORE = 0.45  # time that threads wait for a core, in cores, above which one thread fewer is faster
IDLE_CORE = 0.8  # idle time, in cores, above which there is room for one more thread
LONGEST_PATIENCE = 40  # maximum number of intervals with room before a thread is added


READER_NICE = 10  # niceness of the thread that reads adapters during a step on the same cores
log = logging.getLogger(__name__)


def set_threads(threads: int) -> None:
    """Set the number of the model's threads. By default there are no more threads than the CPU quota can keep busy:
    threads that spin while waiting would exhaust the quota, and then all threads stop until the next period."""
    if threads:
        torch.set_num_threads(threads)
    elif cpu_quota() < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cpus(torch.get_num_threads()))
        log.info("threads of the model: %d, as the CPU quota is %.2f cores", torch.get_num_threads(), cpu_quota())


def stay_single_threaded() -> None:
    """Keep a reader thread single-threaded and unbound. Parallel torch code in it would start its own OpenMP workers;
    with more workers than cores libgomp stops spinning between parallel regions, and every step takes almost twice as
    long. The thread must also not inherit the core that the engine's thread is bound to."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))  # the parent is not bound


def step_aside() -> None:
    """Also lower the thread's priority: on a CPU a reader takes cores from the step, whose parallel regions wait for
    their slowest thread."""
    stay_single_threaded()
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICE)


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds as counted by the kernel. `waited` is the total time that the model's threads waited for a core; `idle`
    is the total idle time of the cores that the process may use."""

    clock: float
    waited: float
    idle: float

    def since(self, before: "Usage") -> "Usage":
        return Usage(self.clock - before.clock, self.waited - before.waited, self.idle - before.idle)


class ThreadCount:
    """Chooses the number of threads, from 1 to `most`, from the usage in each interval."""

    def __init__(self, most: int) -> None:
        self.count = self._most = most
        self._patience = 1  # consecutive intervals with room before a thread is added
        self._with_room = 0
        self._is_new = False  # the last interval added a thread

    def after(self, interval: Usage) -> int:
        """Return the number of threads for the next interval."""
        lost = interval.waited / interval.clock
        has_room = interval.idle / interval.clock >= IDLE_CORE
        self._with_room = self._with_room + 1 if has_room else 0
        if lost >= LOST_CORE and self.count > 1:
            self._remove()
        elif self.count < self._most and self._with_room >= self._patience:
            self.count, self._with_room, self._is_new = self.count + 1, 0, True
        elif self._is_new:  # the added thread has a core to itself
            self._is_new, self._patience = False, max(1, self._patience // 2)
        return self.count

    def _remove(self) -> None:
        """Remove a thread. If it was added in the last interval, wait longer before adding the next one."""
        self._patience = min(2 * self._patience, LONGEST_PATIENCE) if self._is_new else 1
        self.count, self._with_room, self._is_new = self.count - 1, 0, False


class AdaptiveThreads:
    """Sets the number of threads of torch and the native code. The engine's thread calls `adapt` after every step."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._count = ThreadCount(self._most)
        self._cores = {thread: os.sched_getaffinity(thread) for thread in thread_ids(self._most)}
        self._watch()

    def adapt(self, step_seconds: float) -> None:
        """Record a step, and at the end of an interval choose the number of threads for the next."""
        self._busy += step_seconds
        elapsed = time.monotonic() - self._before.clock
        if elapsed < INTERVAL:
            return
        if self._busy > elapsed / 2:  # an idle engine shows nothing
            self._use(self._count.after(self._usage().since(self._before)))
        self._watch()

    def _use(self, count: int) -> None:
        if count == torch.get_num_threads():
            return
        torch.set_num_threads(count)
        everywhere = set().union(*self._cores.values())
        for thread in thread_ids(count):  # a bound thread cannot avoid a busy core: unbind if some are removed
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
    """Return the total idle time of the cores in seconds."""
    names = {f"cpu{core}" for core in cores}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = sum(int(words[4]) + int(words[5]) for words in lines if words[0] in names)  # idle, and waiting for disks
    return ticks / os.sysconf("SC_CLK_TCK")


def adaptive_threads(device: str) -> Callable[[float], None]:
    """Return `AdaptiveThreads.adapt`, or a no-op if there is one thread or the kernel does not report thread usage."""
    if device != "cpu" or sys.platform != "linux" or torch.get_num_threads() == 1:
        return lambda _: None
    try:
        return AdaptiveThreads().adapt
    except (NativeUnavailable, OSError, ValueError, IndexError):
        return lambda _: None

"""The share of the machine that this process may use. Processors and memory are those of the host; a container's limits
are set by cgroups, at the process's own level or at any level above it, and the tightest one counts.

Version 2 of cgroups is one tree with all controllers, version 1 a tree for each, and a hybrid system has both. They are
looked for where systemd and container runtimes mount them. Files that cannot be read, or that hold something else than
what the kernel writes, limit nothing.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_DEFAULT_PERIOD = "100000"  # microseconds


def available_cpus(cores: int | None = None, proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The number of cores that this process can keep busy, out of `cores`, by default all that it may be scheduled on.
    A quota is rounded down, but to no less than one: threads that wait for each other use up what is left of a core.

    A thread that OpenMP has bound may be scheduled on one core alone; it has to say `cores`.
    """
    return max(math.floor(min(schedulable_cores() if cores is None else cores, cpu_quota(proc, cgroups))), 1)


def schedulable_cores() -> int:
    """The number of cores that the calling thread may run on, as CPU sets and taskset have it."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """The processor time, in cores, that the cgroups grant this process; infinite where none of them limits it."""
    return min(map(_quota, _levels("cpu", proc, cgroups)), default=math.inf)


def memory_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Bytes that the cgroups grant this process, those of others in the same cgroups included; infinite where none of
    them grants less than the host has."""
    limit = min(map(_limit, _levels("memory", proc, cgroups)), default=math.inf)
    return limit if limit < _host_memory(proc) else math.inf  # version 1 writes a huge number for no limit


def total_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that the host has, or as many of them as the cgroups grant."""
    return int(min(_host_memory(proc), memory_limit(proc, cgroups)))


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that can be had without swapping and without passing a limit; where Linux is not there to say,
    half of all."""
    free = _meminfo(proc, "MemAvailable") or _host_memory(proc) // 2
    return max(int(min([free, *map(_room, _levels("memory", proc, cgroups))])), 0)


def _host_memory(proc: Path) -> int:
    return _meminfo(proc, "MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(proc: Path, name: str) -> int:
    found = re.search(rf"^{name}:(.*)kB$", _read(proc / "meminfo"), re.MULTILINE)
    return _amount(found[1]) << 10 if found else 0


# -- what one cgroup grants --------------------------------------------------------------------------------------------


def _quota(level: Path) -> float:
    words = _read(level / "cpu.max").split()
    if not words:
        words = [_read(level / "cpu.cfs_quota_us"), _read(level / "cpu.cfs_period_us")]
    quota, period = map(_amount, [*words, _DEFAULT_PERIOD][:2])
    return quota / period if quota and period else math.inf


def _limit(level: Path) -> float:
    return _amount(_read(level / "memory.max")) or _amount(_read(level / "memory.limit_in_bytes")) or math.inf


def _room(level: Path) -> float:
    """The bytes left of the limit. The kernel drops file pages that were not used lately before it refuses memory."""
    used = _amount(_read(level / "memory.current")) or _amount(_read(level / "memory.usage_in_bytes"))
    return _limit(level) - max(used - _inactive_file(level), 0)


def _inactive_file(level: Path) -> int:
    """Version 1 counts the cgroup's own pages without a prefix; its usage is that of the cgroups below it, too."""
    found = dict(re.findall(r"^(\w+) (\d+)$", _read(level / "memory.stat"), re.MULTILINE))
    return _amount(found.get("total_inactive_file") or found.get("inactive_file", ""))


# -- where the cgroups are ---------------------------------------------------------------------------------------------


def _levels(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The cgroups that may limit what `controller` hands out to this process."""
    paths = _own_paths(proc)
    yield from _lineage(_version_2(cgroups), paths.get("", ""))
    if controller in paths or not paths:  # else a cgroup of somebody else may have the controller's name
        for mount in _version_1(controller, cgroups):
            yield from _lineage(mount, paths.get(controller, ""))


def _own_paths(proc: Path) -> dict[str, str]:
    """This process's cgroup by controller; version 2 has the empty name."""
    lines = re.findall(r"^\d+:([^:]*):(.*)$", _read(proc / "self" / "cgroup"), re.MULTILINE)
    return {name: path for names, path in lines for name in names.split(",")}


def _version_2(cgroups: Path) -> Path:
    """The root of version 2, which on a hybrid system is beside those of version 1."""
    is_alone = os.path.exists(cgroups / "cgroup.controllers") or not os.path.isdir(cgroups / "unified")
    return cgroups if is_alone else cgroups / "unified"


def _version_1(controller: str, cgroups: Path) -> list[Path]:
    """The roots of version 1 that have `controller`, alone or among others as in "cpu,cpuacct"."""
    try:
        return [path for path in cgroups.iterdir() if controller in path.name.split(",")]
    except OSError:
        return []


def _lineage(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup `path` and those above it, up to what is mounted. In a container, what is mounted may be a cgroup
    that `path` names as seen from the host: then the beginning of `path` leads nowhere."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]  # ".." is above what is mounted
    tails = (parts[start:] for start in range(len(parts)))
    own = next((tail for tail in tails if os.path.isdir(mount.joinpath(*tail))), [])
    for depth in range(len(own), -1, -1):
        yield mount.joinpath(*own[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _amount(text: str) -> int:
    """A positive number; 0 for "max", -1, and whatever else names none."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,20}\s*", text) else 0

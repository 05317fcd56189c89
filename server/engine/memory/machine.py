"""The processors and memory that this process may use. Containers are limited by cgroups, at the process's own level or
at any level above it; the tightest limit applies.

Version 2 of cgroups is one tree with all controllers, version 1 has a tree per controller, and a hybrid system has
both. They are expected where systemd and container runtimes mount them. Unreadable or malformed files are ignored.
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
    """Return the number of cores that this process can keep busy, at most `cores` (default: all it may run on). A quota
    is rounded down, but to no less than one, because threads that wait for each other use up a fraction of a core.

    A thread that OpenMP has bound to one core must pass `cores`.
    """
    return max(math.floor(min(schedulable_cores() if cores is None else cores, cpu_quota(proc, cgroups))), 1)


def schedulable_cores() -> int:
    """Return the number of cores that the calling thread may run on, according to CPU sets and taskset."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Return the CPU quota of this process's cgroups in cores; infinite if there is none."""
    return min(map(_quota, _levels("cpu", proc, cgroups)), default=math.inf)


def memory_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Return the memory limit of this process's cgroups in bytes, which other processes in them share; infinite if none
    is below the host's memory."""
    limit = min(map(_limit, _levels("memory", proc, cgroups)), default=math.inf)
    return limit if limit < _host_memory(proc) else math.inf  # version 1 writes a huge number for no limit


def total_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the host's memory in bytes, or the memory limit if that is lower."""
    return int(min(_host_memory(proc), memory_limit(proc, cgroups)))


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the bytes that can be allocated without swapping or exceeding a limit; half of all memory if the system is
    not Linux."""
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
    """Return the bytes left below the limit. Inactive file pages count as free, because the kernel drops them first."""
    used = _amount(_read(level / "memory.current")) or _amount(_read(level / "memory.usage_in_bytes"))
    return _limit(level) - max(used - _inactive_file(level), 0)


def _inactive_file(level: Path) -> int:
    """Return the bytes of inactive file pages. Version 1 needs the `total_` value, because its usage includes the
    cgroups below."""
    found = dict(re.findall(r"^(\w+) (\d+)$", _read(level / "memory.stat"), re.MULTILINE))
    return _amount(found.get("total_inactive_file") or found.get("inactive_file", ""))


# -- where the cgroups are ---------------------------------------------------------------------------------------------


def _levels(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the cgroups that may limit the resource of `controller` for this process."""
    paths = _own_paths(proc)
    yield from _lineage(_version_2(cgroups), paths.get("", ""))
    if controller in paths or not paths:  # otherwise an unrelated cgroup may have the controller's name
        for mount in _version_1(controller, cgroups):
            yield from _lineage(mount, paths.get(controller, ""))


def _own_paths(proc: Path) -> dict[str, str]:
    """Return this process's cgroup by controller; version 2 has the empty name."""
    lines = re.findall(r"^\d+:([^:]*):(.*)$", _read(proc / "self" / "cgroup"), re.MULTILINE)
    return {name: path for names, path in lines for name in names.split(",")}


def _version_2(cgroups: Path) -> Path:
    """Return the root of version 2, which on a hybrid system is beside those of version 1."""
    is_alone = os.path.exists(cgroups / "cgroup.controllers") or not os.path.isdir(cgroups / "unified")
    return cgroups if is_alone else cgroups / "unified"


def _version_1(controller: str, cgroups: Path) -> list[Path]:
    """Return the roots of version 1 with `controller`, alone or combined as in "cpu,cpuacct"."""
    try:
        return [path for path in cgroups.iterdir() if controller in path.name.split(",")]
    except OSError:
        return []


def _lineage(mount: Path, path: str) -> Iterator[Path]:
    """Yield the cgroup `path` and those above it, up to the mount point. In a container, `path` may be relative to the
    host's root while a lower cgroup is mounted; then the beginning of `path` does not exist."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]  # ".." is above the mount point
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
    """Parse a positive number; 0 for "max", -1 and anything else."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,20}\s*", text) else 0

"""The share of the machine that a process may use, read from made-up files and from real cgroups."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from server.engine import threads as engine_threads
from server.engine.memory import machine, sizing
from server.engine.memory.machine import CGROUPS, PROC
from tests.fixtures.engine_driver import make_driver

ROOT = Path(__file__).parent.parent
MIB, GIB = 1 << 20, 1 << 30
NO_LIMIT = str(2**63 - 4096)  # how version 1 writes it
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


class Machine:
    """Made-up files under `folder`, and what is read from them."""

    def __init__(self, folder: Path, own: str, files: dict[str, str | bytes], meminfo: str = MEMINFO) -> None:
        self.roots = (folder / "proc", folder / "cgroup")
        self.roots[1].mkdir()
        written = {"proc/self/cgroup": own, "proc/meminfo": meminfo}
        written |= {f"cgroup/{name}": content for name, content in files.items()}
        for name, content in written.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def cpus(self, cores: int = 16) -> int:
        return machine.available_cpus(cores, *self.roots)

    def quota(self) -> float:
        return machine.cpu_quota(*self.roots)

    def total(self) -> int:
        return machine.total_memory(*self.roots)

    def limit(self) -> float:
        return machine.memory_limit(*self.roots)

    def available(self) -> int:
        return machine.available_memory(*self.roots)


V1 = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


def v1_cpu(quota: object, period: object = 100000) -> dict[str, str | bytes]:
    folder = "cpu,cpuacct/docker/abc"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def v2(**files: str) -> dict[str, str | bytes]:
    """Files of version 2, `a__cpu_max` for a/cpu.max."""
    named: dict[str, str | bytes] = {"cgroup.controllers": "cpu memory\n"}
    return named | {name.replace("__", "/").replace("_", "."): content for name, content in files.items()}


@pytest.mark.parametrize(
    ("written", "cpus"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 1),  # a second thread would use up the quota of the first by waiting for it
        ("20000 100000\n", 1),
        ("1000 1000000\n", 1),
        ("6400000 100000\n", 16),
        ("300000\n", 3),  # the period is the default
        ("25000 50000 0\n", 1),
        ("", 16),
        ("\n", 16),
        ("a b\n", 16),
        ("-1 100000\n", 16),
        ("0 100000\n", 16),
        ("200000 0\n", 16),
        ("200000 many\n", 16),
        ("9" * 5000 + " 1", 16),
    ],
)
def test_threads_follow_the_quota_of_version_2(tmp_path: Path, written: str, cpus: int) -> None:
    assert Machine(tmp_path, "0::/\n", v2(cpu_max=written)).cpus() == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [(-1, 100000, 16), (200000, 100000, 2), (250000, 100000, 2), (5000, 50000, 1), (100000, "", 16), ("?", "?", 16)],
)
def test_threads_follow_the_quota_of_version_1(tmp_path: Path, quota: object, period: object, cpus: int) -> None:
    assert Machine(tmp_path, V1, v1_cpu(quota, period)).cpus() == cpus


def test_without_a_quota_threads_are_the_cores_that_the_process_may_be_scheduled_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "schedulable_cores", lambda: 3)
    files = Machine(tmp_path, "0::/\n", v2(cpu_max="max 100000"))
    assert machine.available_cpus(None, *files.roots) == 3
    assert files.quota() == math.inf
    (tmp_path / "cgroup" / "cpu.max").write_text("200000 100000")
    assert machine.available_cpus(None, *files.roots) == 2


def test_the_tightest_level_limits_the_process(tmp_path: Path) -> None:
    """A pod's limit holds for its containers, and a container may have less than its pod."""
    files = v2(
        pod__cpu_max="150000 100000", pod__memory_max=str(GIB), pod__memory_current=str(900 * MIB),
        pod__box__cpu_max="400000 100000", pod__box__memory_max=str(2 * GIB), pod__box__memory_current=str(MIB),
        pod__box__leaf__cpu_max="max 100000", pod__box__leaf__memory_max="max",
        other__cpu_max="10000 100000", other__memory_max="4096",
    )  # fmt: skip
    found = Machine(tmp_path, "0::/pod/box/leaf\n", files)
    assert found.quota() == 1.5 and found.cpus() == 1
    assert found.total() == found.limit() == GIB
    assert found.available() == 124 * MIB


def test_in_a_namespace_of_its_own_the_process_is_at_the_root(tmp_path: Path) -> None:
    found = Machine(tmp_path, "0::/\n", v2(cpu_max="100000 100000", memory_max=str(GIB)))
    assert (found.cpus(), found.total()) == (1, GIB)


@pytest.mark.parametrize(
    "own", ["0::/docker/abc\n", "0::/../abc\n", "0::/../../..\n", "0::/docker/abc (deleted)\n", ""]
)
def test_a_path_that_is_the_host_s_leads_to_what_is_mounted(tmp_path: Path, own: str) -> None:
    (tmp_path / "memory.max").write_text("4096")  # outside the mount
    found = Machine(tmp_path, own, v2(cpu_max="100000 100000", memory_max=str(GIB)))
    assert (found.cpus(), found.total()) == (1, GIB)


def test_a_cgroup_within_a_container_is_found_though_its_path_is_the_host_s(tmp_path: Path) -> None:
    files = v1_cpu(200000) | {
        "memory/memory.limit_in_bytes": str(4 * GIB),
        "memory/worker/memory.limit_in_bytes": str(GIB),
    }
    assert Machine(tmp_path, "9:memory:/docker/abc/worker\n", files).total() == GIB


def test_version_1_is_found_by_each_controller_s_own_path(tmp_path: Path) -> None:
    own = "9:memory:/a:b\n4:cpuacct,cpu:/c\n1:name=systemd:/d\n"
    files: dict[str, str | bytes] = {
        "cpu,cpuacct/c/cpu.cfs_quota_us": "300000",
        "cpu,cpuacct/c/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/d/cpu.cfs_quota_us": "100000",
        "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
        "memory/a:b/memory.limit_in_bytes": str(3 * GIB),
        "memory/d/memory.limit_in_bytes": str(GIB),
    }
    found = Machine(tmp_path, own, files)
    assert (found.cpus(), found.total()) == (3, 3 * GIB)


def test_a_hybrid_system_is_limited_by_both_versions(tmp_path: Path) -> None:
    """systemd's: controllers are on version 1, and version 2 is mounted beside them."""
    own = "9:memory:/box\n4:cpu,cpuacct:/box\n0::/box\n"
    files: dict[str, str | bytes] = {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "400000",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "memory/box/memory.limit_in_bytes": NO_LIMIT,
        "memory/box/memory.usage_in_bytes": "4096",
        "unified/cgroup.controllers": "memory\n",
        "unified/box/memory.max": str(GIB),
        "unified/box/cpu.max": "max 100000",
    }
    found = Machine(tmp_path, own, files)
    assert (found.cpus(), found.total()) == (4, GIB)


def test_cgroups_of_others_that_have_the_name_of_a_mount_limit_nothing(tmp_path: Path) -> None:
    others = {f"{name}__memory_max": "4096" for name in ("memory", "unified")}
    found = Machine(tmp_path, "0::/own\n", v2(own__memory_max=str(GIB), cpu__cpu_max="1000 100000", **others))
    assert (found.cpus(), found.total()) == (16, GIB)


def test_memory_follows_the_limit_of_version_1(tmp_path: Path) -> None:
    folder = "memory/docker/abc"
    files: dict[str, str | bytes] = {
        "memory/memory.limit_in_bytes": NO_LIMIT,
        "memory/memory.usage_in_bytes": str(12 * GIB),
        f"{folder}/memory.limit_in_bytes": str(2 * GIB),
        f"{folder}/memory.usage_in_bytes": str(1536 * MIB),
        f"{folder}/memory.stat": f"inactive_file 0\nactive_file 5\ntotal_inactive_file {256 * MIB}\n",
    }
    found = Machine(tmp_path, V1, files)
    assert found.total() == 2 * GIB
    assert found.available() == 768 * MIB  # files that were not used lately can go


def test_memory_follows_the_limit_of_version_2(tmp_path: Path) -> None:
    stat = f"anon 1\nfile 2\ninactive_anon 7\ninactive_file {100 * MIB}\n"
    files = v2(memory_max=str(GIB), memory_current=str(GIB), memory_stat=stat)
    found = Machine(tmp_path, "0::/\n", files)
    assert (found.total(), found.available()) == (GIB, 100 * MIB)


@pytest.mark.parametrize("written", ["max\n", NO_LIMIT, str(2**64 - 1), "-1", "0", "", "much", str(17 * GIB)])
def test_without_a_memory_limit_the_host_s_memory_counts(tmp_path: Path, written: str) -> None:
    files = v2(memory_max=written, memory_current=str(GIB))
    found = Machine(tmp_path, "0::/\n", files)
    assert (found.limit(), found.total(), found.available()) == (math.inf, 16 * GIB, 8 * GIB)


def test_the_host_may_have_less_left_than_the_limit(tmp_path: Path) -> None:
    files = v2(memory_max=str(12 * GIB), memory_current=str(GIB))
    assert Machine(tmp_path, "0::/\n", files).available() == 8 * GIB


def test_a_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = v2(memory_max=str(GIB), memory_current=str(GIB + 4096), memory_stat="inactive_file 0\n")
    assert Machine(tmp_path, "0::/\n", files).available() == 0


def test_a_limit_without_a_known_usage_still_bounds(tmp_path: Path) -> None:
    assert Machine(tmp_path, "0::/\n", v2(memory_max=str(GIB), memory_stat="garbage")).available() == GIB


def test_an_old_kernel_that_does_not_estimate_what_is_available_leaves_half(tmp_path: Path) -> None:
    assert Machine(tmp_path, "", {}, "MemTotal: 4194304 kB\n").available() == 2 * GIB


def test_without_any_files_the_process_has_the_machine(tmp_path: Path) -> None:
    roots = (tmp_path / "no-proc", tmp_path / "no-cgroup")
    assert machine.available_cpus(4, *roots) == 4
    assert machine.available_cpus(None, *roots) == machine.schedulable_cores()
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.total_memory(*roots) == host and machine.available_memory(*roots) == host // 2


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe\0", b"::::\n:\n0\n", b"0::\0\n4:cpu:/\xc3\n", b"-5\n" * 100])
def test_odd_files_limit_nothing(tmp_path: Path, garbage: bytes) -> None:
    names = ("cpu.max", "memory.max", "memory.current", "memory.stat", "memory/memory.stat", "cpu/cpu.cfs_quota_us")
    found = Machine(tmp_path, "", dict.fromkeys(names, garbage))
    (tmp_path / "proc" / "self" / "cgroup").write_bytes(garbage)
    (tmp_path / "cgroup" / "memory" / "memory.limit_in_bytes").mkdir()
    assert (found.cpus(), found.total(), found.available()) == (16, 16 * GIB, 8 * GIB)
    (tmp_path / "proc" / "meminfo").write_bytes(garbage)
    assert found.total() > 0 and found.available() > 0


# -- what an engine makes of it ----------------------------------------------------------------------------------------


def test_an_engine_s_plans_stay_within_a_memory_limit(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters off the device get three quarters of what is left once the KV cache and the pool are full."""
    monkeypatch.setattr(sizing, "memory_limit", lambda: GIB)
    monkeypatch.setattr(sizing, "total_memory", lambda: GIB)
    monkeypatch.setattr(sizing, "available_memory", lambda: 400 * MIB)
    driver = make_driver(llama_folder, tmp_path, kv_cache_bytes=0)
    try:
        cache = driver.engine._runner.kv_cache
        assert 127 * MIB < sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) <= 128 * MIB
        assert 200 * MIB < driver.engine.residency.host.max_bytes < 204 * MIB
    finally:
        driver.engine.residency.close()


@pytest.mark.parametrize("limit", [math.inf, 8 * GIB])
def test_what_fits_is_planned_as_it_was_set(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr(sizing, "memory_limit", lambda: limit)
    monkeypatch.setattr(sizing, "available_memory", lambda: 7 * GIB)
    driver = make_driver(llama_folder, tmp_path)
    assert driver.engine.residency.host.max_bytes == 2 * GIB
    driver.engine.residency.close()


@pytest.mark.parametrize(
    ("set_by_flag", "set_by_operator", "quota", "threads"),
    [
        (0, None, math.inf, 4),
        (0, None, 4.0, 4),
        (0, None, 1.5, 1),
        (0, None, 0.2, 1),
        (3, None, 1.0, 3),
        (0, "4", 1.0, 4),
    ],
)
def test_threads_that_nobody_has_set_follow_the_quota(
    monkeypatch: pytest.MonkeyPatch, set_by_flag: int, set_by_operator: str | None, quota: float, threads: int
) -> None:
    given = [4]
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: quota)
    monkeypatch.setattr(engine_threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(engine_threads.torch, "get_num_threads", lambda: given[-1])
    monkeypatch.setattr(engine_threads.torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_operator is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_operator)
    engine_threads.set_threads(set_by_flag)
    assert given[-1] == threads


# -- real cgroups ------------------------------------------------------------------------------------------------------

READ = """
import json, sys
with open(sys.argv[1], "w") as procs:
    procs.write("0")
from server.engine.memory import machine
found = [machine.available_cpus(), machine.cpu_quota(), machine.total_memory(), machine.available_memory()]
print(json.dumps([*found, "torch" in sys.modules]))
"""
SERVE = """
import json, os, sys
with open(sys.argv[1], "w") as procs:
    procs.write("0")
from server.config import ServeConfig
from server.engine import worker
worker._bind_threads(ServeConfig(device="cpu"))
import torch
from server.engine import threads
threads.set_threads(0)
print(json.dumps([os.environ.get("OMP_PROC_BIND"), torch.get_num_threads()]))
"""


def report_from(cgroup: Path, program: str) -> list[Any]:
    """The list that `program` prints from within `cgroup`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", program, str(cgroup / "cgroup.procs")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    found: list[Any] = json.loads(ended.stdout)
    return found


@contextmanager
def child_cgroup(controller: str, **files: str) -> Iterator[Path]:
    """A cgroup below this process's own, of the version that has `controller`; skips where there cannot be one."""
    parent, version = own_cgroup(controller)
    folder = parent / f"loraplex-test-{os.getpid()}"
    with enabled(controller, parent, version):
        try:
            folder.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made: {error}")
        try:
            write_limits(folder, files, version)
            yield folder
        finally:
            remove(folder)


def own_cgroup(controller: str) -> tuple[Path, int]:
    paths = machine._own_paths(PROC)
    if controller in paths and (roots := machine._version_1(controller, CGROUPS)):
        return next(machine._lineage(roots[0], paths[controller])), 1
    parent = next(machine._lineage(machine._version_2(CGROUPS), paths.get("", "")))
    with suppress(OSError):
        if controller in (parent / "cgroup.controllers").read_text().split():
            return parent, 2
    pytest.skip(f"no cgroups with the controller {controller!r} are mounted")


@contextmanager
def enabled(controller: str, parent: Path, version: int) -> Iterator[None]:
    """In version 2 the children of `parent` have the controllers that it hands on."""
    control = parent / "cgroup.subtree_control"
    if version == 1 or controller in control.read_text().split():
        yield
        return
    try:
        control.write_text(f"+{controller}")
    except OSError as error:
        pytest.skip(f"the controller {controller!r} cannot be handed on to a child: {error}")
    try:
        yield
    finally:
        control.write_text(f"-{controller}")


def write_limits(folder: Path, files: dict[str, str], version: int) -> None:
    """`files` has the settings `v1_…` and `v2_…`."""
    for name, value in files.items():
        if name.startswith(f"v{version}_"):
            (folder / name[3:].replace("_", ".", 1)).write_text(value)


def remove(folder: Path) -> None:
    for _ in range(50):  # a process that has ended may be in it for a moment
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.02)
    folder.rmdir()


def cpu_limit(quota: float) -> Any:
    micro = str(int(quota * 100000))
    return child_cgroup("cpu", v1_cpu_cfs_period_us="100000", v1_cpu_cfs_quota_us=micro, v2_cpu_max=f"{micro} 100000")


@pytest.mark.parametrize("quota", [0.5, 1.0, 1.5, 64.0])
def test_a_real_cgroup_limits_the_cores(quota: float) -> None:
    with cpu_limit(quota) as cgroup:
        cpus, found, _, _, has_torch = report_from(cgroup, READ)
    assert found == quota and not has_torch
    assert cpus == max(min(math.floor(quota), machine.schedulable_cores()), 1)


def test_a_real_cgroup_limits_the_memory() -> None:
    with child_cgroup("memory", v1_memory_limit_in_bytes=str(GIB // 2), v2_memory_max=str(GIB // 2)) as cgroup:
        _, _, total, available, _ = report_from(cgroup, READ)
    assert total == GIB // 2
    assert GIB // 4 < available <= GIB // 2


def test_the_model_s_threads_follow_a_real_cgroup_and_are_not_bound() -> None:
    with cpu_limit(1.0) as cgroup:
        bound, threads = report_from(cgroup, SERVE)
    cores = machine.schedulable_cores()
    assert threads == 1
    assert bound == ("true" if cores == 1 else None)

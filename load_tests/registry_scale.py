"""What 10,000 registered adapters cost: opening, lookups, pages, changes, memory, and the start of a whole server.

    python -m load_tests.registry_scale [--adapters 10000] [--server]

A data folder is filled with tiny adapters through the registry's own tables and store. A fresh process opens it and
measures; another one does the same with an empty folder, so that the difference is what the adapters cost. With
`--server`, `loraplex serve` over a tiny model starts on both.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapters.peft.digest import digest_of as content_digest
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE
from adapters.registry.db import connect, point, transaction
from adapters.registry.journal import name_line
from adapters.registry.registry import AdapterRegistry, AdapterVersion
from adapters.registry.store import AdapterStore

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_REPORT = {
    "applied": {"modules": 210, "tensors": 420},
    "features": ["rslora"],
    "selftest": {"max_abs_logit_diff": 2.1457672119140625e-06},
}
_PAGE = 100
_CHANGES = 20
_STARTS = 3  # of which the fastest counts


def name_of(index: int) -> str:
    return f"tenant-{index % 97:02d}-adapter-{index:06d}"


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def fill(data_dir: Path, count: int) -> None:
    """Publish `count` adapters in one transaction; their files are hard links to one pair."""
    AdapterRegistry(data_dir).close()
    store = AdapterStore(data_dir / "store")
    with store.stage() as folder:
        (folder / CONFIG_FILE).write_text("{}")
        save_file({"lora_A": np.zeros((16, 64), dtype=np.float32)}, folder / WEIGHTS_FILE)
        for index in range(count):
            place = store.path(digest_of(name_of(index)))
            place.mkdir(parents=True)
            for file in FILES:
                os.link(folder / file, place / file)
    db = connect(data_dir, store)
    with transaction(db):
        for index in range(count):
            digest = digest_of(name_of(index))
            version = AdapterVersion(digest, 16, _TARGETS, 1_843_200, 1_795_340_000 + index, json.dumps(_REPORT))
            point(db, name_of(index), version, "upload", False, 5)
    db.close()


def measure(data_dir: Path, count: int) -> dict[str, float]:
    """Times in ms, memory in bytes; of this process, which should be a fresh one."""
    gc.collect()
    before = _rss_bytes(os.getpid())
    started = time.perf_counter()
    registry = AdapterRegistry(data_dir)
    opened = _ms_since(started)
    gc.collect()
    found = {"open_ms": opened, "open_rss_bytes": _rss_bytes(os.getpid()) - before}
    try:
        reads = _measure_reads(registry, count) | _measure_upkeep(registry, count) if count else {}
        return found | reads | _measure_writes(registry)
    finally:
        registry.close()


def _measure_reads(registry: AdapterRegistry, count: int) -> dict[str, float]:
    names = [name_of(index) for index in range(0, count, 7)]
    version = digest_of(names[-1])
    return {
        "resolve_ms": _median_ms(registry.resolve, names),
        "resolve_worst_ms": max(_times_ms(registry.resolve, names)),
        "resolve_version_ms": _median_ms(lambda _: registry.resolve(f"{names[-1]}@{version[:12]}"), range(100)),
        "names_of_ms": _median_ms(registry.names_of, [digest_of(name) for name in names[:200]]),
        "page_ms": _median_ms(lambda name: registry.records(limit=_PAGE, after=name), names[:100]),
        "all_pages_ms": _median_ms(lambda _: _walk(registry), range(3)),
    }


def _measure_upkeep(registry: AdapterRegistry, count: int) -> dict[str, float]:
    """The journal, and the scrub: what a look for work takes, and the CPU time of checking one version."""
    digests = [digest_of(name_of(index)) for index in range(0, count, count // 100)]

    def check(digest: str) -> None:
        signature = registry.store.signature(digest)
        registry.names_of(digest)
        content_digest(registry.store.path(digest))
        registry.note_check(digest, None, signature)

    before = time.thread_time()
    times = _times_ms(check, digests)
    return {
        "journal_write_ms": _median_ms(lambda _: registry._write_journal(), range(3)),
        "journal_append_ms": _median_ms(lambda name: registry._note(name_line(registry._db, name)), _names(count)),
        "scrub_look_ms": _median_ms(lambda _: registry.unchecked(0), range(3)),
        "scrub_look_all_due_ms": _median_ms(lambda _: registry.unchecked(1 << 40), range(3)),
        "scrub_check_ms": statistics.median(times),
        "scrub_check_cpu_ms": (time.thread_time() - before) * 1000 / len(digests),
    }


def _names(count: int) -> list[str]:
    return [name_of(index) for index in range(0, count, count // _CHANGES)]


def _walk(registry: AdapterRegistry) -> None:
    after, more = "", True
    while more:
        page, more = registry.records(limit=_PAGE, after=after)
        after = page[-1].name


def _measure_writes(registry: AdapterRegistry) -> dict[str, float]:
    def remove(index: int) -> None:
        registry.retire(f"new-{index}")
        registry.collect_garbage()

    return {
        "publish_ms": _median_ms(lambda index: _publish(registry, f"new-{index}"), range(_CHANGES)),
        "delete_ms": _median_ms(remove, range(_CHANGES)),
    }


def _publish(registry: AdapterRegistry, name: str) -> None:
    inspected: Any = SimpleNamespace(
        digest=digest_of(name), rank=16, target_modules=_TARGETS, nbytes=1_843_200, report=_REPORT
    )
    with registry.store.stage() as folder:
        for file in FILES:
            (folder / file).write_text("{}")
        registry.publish(name, inspected, folder)


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _times_ms(function: Callable[[Any], Any], arguments: Any) -> list[float]:
    times = []
    for argument in arguments:
        started = time.perf_counter()
        function(argument)
        times.append(_ms_since(started))
    return times


def _median_ms(function: Callable[[Any], Any], arguments: Any) -> float:
    return statistics.median(_times_ms(function, arguments))


async def _measure_api(folder: Path) -> dict[str, float]:
    """The routes over a fake engine, in this process; `folder` has the data folder under `data`."""
    async with import_module("tests.fixtures.api_server").serving(folder) as api:
        routes = {
            "GET /v1/adapters": "/v1/adapters",
            "GET /v1/adapters, last page": f"/v1/adapters?after={name_of(96)}",
            "GET /v1/adapters?tier=device": "/v1/adapters?tier=device",
            "GET /v1/models": "/v1/models",
            "GET /metrics": "/metrics",
        }
        found = {}
        for what, path in routes.items():
            times = []
            for _ in range(5):
                started = time.perf_counter()
                (await api.http.get(path)).raise_for_status()
                times.append(_ms_since(started))
            found[what] = statistics.median(times)
        return found


def _measure_server(data_dir: Path, model: Path) -> dict[str, float]:
    """Start to ready of `loraplex serve`, and the memory of its API process."""
    started = time.perf_counter()
    flags = ("--model", str(model), "--served-model-name", "tiny", "--threads", "1")
    with import_module("tests.fixtures.tiny_server").running_server(data_dir, *flags) as server:
        ready = _ms_since(started)
        return {"ready_ms": ready, "rss_bytes": _rss_bytes(server.process.pid)}


def _in_fresh_process(data_dir: Path, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "load_tests.registry_scale", "--measure", str(data_dir), "--adapters", str(count)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def run(count: int, with_server: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        empty, full = root / "empty" / "data", root / "full" / "data"
        AdapterRegistry(empty).close()
        fill(full, count)
        result: dict[str, Any] = {"adapters": count, "empty": _in_fresh_process(empty, 0)}
        result["full"] = _in_fresh_process(full, count)
        result["api"] = asyncio.run(_measure_api(full.parent))
        if with_server:
            model = import_module("tests.fixtures.tiny_server").write_tiny_model(root / "model")
            rounds = [(_measure_server(empty, model), _measure_server(full, model)) for _ in range(_STARTS)]
            starts = dict(zip(("empty", "full"), zip(*rounds, strict=True), strict=True))
            result["server"] = {which: min(runs, key=lambda run: run["ready_ms"]) for which, runs in starts.items()}
        return result | {"per_adapter_bytes": _per_adapter(result["full"], result["empty"], "open_rss_bytes", count)}


def _per_adapter(full: dict[str, float], empty: dict[str, float], key: str, count: int) -> float:
    return (full[key] - empty[key]) / count


def report(result: dict[str, Any]) -> str:
    empty, full, count = result["empty"], result["full"], result["adapters"]
    lines = [f"{'':34}{'empty':>12}{count:>12,}"]
    lines += [f"{key:34}{empty.get(key, float('nan')):12.3f}{value:12.3f}" for key, value in full.items()]
    lines += [f"{key + ' ms':46}{value:12.2f}" for key, value in result["api"].items()]
    lines.append(f"{'resident bytes per adapter (target 2048)':46}{result['per_adapter_bytes']:12.0f}")
    if "server" in result:
        before, after = result["server"]["empty"], result["server"]["full"]
        lines.append(f"{'server: start to ready ms':34}{before['ready_ms']:12.0f}{after['ready_ms']:12.0f}")
        lines.append(f"{'server: bytes per adapter':46}{_per_adapter(after, before, 'rss_bytes', count):12.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--server", action="store_true", help="also start `loraplex serve` over a tiny model")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the fresh process
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.adapters)))
        return
    result = run(options.adapters, options.server)
    print(json.dumps(result, indent=2))
    print(report(result))


if __name__ == "__main__":
    main()

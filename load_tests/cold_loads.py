"""CPU time of a cold load: `python -m load_tests.cold_loads`.

Versions of SmolLM2 are read as a reader thread reads them, in this process and with their files in the page cache: from
their own files, from their packed copies, and then written into the pool. CPU time of the thread, in milliseconds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from adapters.residency.slots import Slot
from load_tests.engine_bench import EngineBench
from load_tests.residency.filling import fill, template, variants
from server.engine.threads import stay_single_threaded


def timed(milliseconds: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the call, whose time is added to the list."""
    started = time.thread_time()
    found = call(*arguments)
    milliseconds.append((time.thread_time() - started) * 1000)
    return found


def measure(bench: EngineBench, digests: list[str]) -> dict[str, list[float]]:
    """Times by what was done, for each version once."""
    residency = bench.engine.residency
    seen: dict[str, list[float]] = {"from its files": [], "packed copy written": [], "from the packed copy": []}
    seen["copied into the pool"] = []
    for digest in digests:
        packed = timed(seen["from its files"], residency._read, digest)
        timed(seen["packed copy written"], residency._keep, digest, packed)
    for digest in digests:
        packed = timed(seen["from the packed copy"], residency._read, digest)
        timed(seen["copied into the pool"], residency._write, Slot(0, digest, [*range(packed.num_pages)]), packed)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.cold_loads")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        versions = variants(template(Path(folder), options.rank), Path(folder) / "versions", options.adapters)
        fill(Path(folder) / "data", versions)
        bench = EngineBench(Path(folder) / "data", 1, max_adapter_rank=max(options.rank, 16), dtype="bfloat16")
        with ThreadPoolExecutor(1, initializer=stay_single_threaded) as thread:
            seen = thread.submit(measure, bench, list(versions)).result()
        bench.engine.close()
    for what, milliseconds in seen.items():
        low, median, high = np.percentile(milliseconds[len(milliseconds) // 10 :], [10, 50, 90])  # after a warm-up
        print(f"{what:<22} {median:6.1f} ms (10% {low:.1f}, 90% {high:.1f})")


if __name__ == "__main__":
    main()

"""Whether the memory of a server grows over uploads and swaps.

    python -m load_tests.memory_growth [--swaps 5000] [--out FILE]

Each swap publishes an adapter that no one has seen under one name, and asks it for some tokens: it is examined, tested,
stored, packed, loaded and replaced. The growth is the median slope between samples (Theil and Sen) of each fifth of the
run, in MiB per 1,000 swaps, of the resident memory of both processes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoModelForCausalLM

from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from load_tests.peers.setting import machine
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import BASE, RunningServer, running_server, write_tiny_model

FLAGS = (
    *("--served-model-name", BASE, "--dtype", "float32", "--threads", "1", "--max-num-seqs", "8"),
    *("--kv-cache-bytes", str(4 << 20), "--adapter-slots", "4", "--adapter-host-bytes", str(2 << 20)),
)
MIB = 1 << 20
PARTS = 5
NAMES = 3


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the median of the slopes between all pairs of points."""
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 != x1)


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    return list(points[:: max(1, len(points) // most)])


def slopes(samples: Sequence[dict[str, float]], what: str) -> list[float]:
    """Return the growth of each part of the run, per 1,000 swaps."""
    size = max(2, len(samples) // PARTS)
    parts = (samples[at : at + size] for at in range(0, size * PARTS, size))
    found = ([(sample["swaps"] / 1000, sample[what]) for sample in part] for part in parts)
    return [round(slope(thinned(points)), 2) for points in found if len(points) > 1]


def sample(server: RunningServer, engine: psutil.Process, swaps: int) -> dict[str, float]:
    processes = {"api": psutil.Process(server.process.pid), "engine": engine}
    found: dict[str, float] = {"swaps": swaps, "seconds": time.monotonic()}
    for name, process in processes.items():
        found[f"{name}_mib"] = process.memory_info().rss / MIB
        found[f"{name}_descriptors"] = process.num_fds()
        found[f"{name}_threads"] = process.num_threads()
    return found


def swap(client: httpx.Client, config: bytes, weights: bytearray, number: int) -> None:
    """Publish weights that differ from all others in their last number, and use them."""
    weights[-4:] = (0x3C000000 + number).to_bytes(4, "little")  # a small float that is another for each swap
    files = {CONFIG_FILE: (CONFIG_FILE, config), WEIGHTS_FILE: (WEIGHTS_FILE, bytes(weights))}
    name = f"swapped-{number % NAMES}"
    client.post("/v1/adapters", data={"name": name, "replace": "true"}, files=files).raise_for_status()
    body = {"model": name, "prompt": [5, 6, 7, number % 200], "max_tokens": 2, "temperature": 0}
    client.post("/v1/completions", json=body).raise_for_status()


def measure(folder: Path, swaps: int, every: int) -> Iterable[dict[str, float]]:
    model = write_tiny_model(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = write_adapter(base, folder / "adapter", seed=0, r=8, target_modules="all-linear")
    config, weights = (adapter / CONFIG_FILE).read_bytes(), bytearray((adapter / WEIGHTS_FILE).read_bytes())
    with running_server(folder / "data", "--model", str(model), *FLAGS) as server, server.client() as client:
        engine = psutil.Process(server.engine_pid())
        for number in range(swaps):
            swap(client, config, weights, number)
            if number % every == 0:
                yield sample(server, engine, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=10, help="swaps between two samples")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for found in measure(Path(folder), options.swaps, options.every):
            samples.append(found)
            if len(samples) % 20 == 0:
                print(json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)
    report: dict[str, Any] = {"machine": machine(), "environment": _environment()}
    for what in ("engine_mib", "api_mib"):
        report[f"{what}_per_1000_swaps"] = slopes(samples, what)
        print(what, "per 1,000 swaps in each fifth:", report[f"{what}_per_1000_swaps"])
    if options.out:
        options.out.write_text(json.dumps({**report, "samples": samples}))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC")}


if __name__ == "__main__":
    main()

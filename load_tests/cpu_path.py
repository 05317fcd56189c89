"""What the C++ operations of the CPU path bring: decode steps of one engine with them and of one without.

    python -m load_tests.cpu_path [--rounds 3]

SmolLM2 in bf16. Each arm is a process of its own, since an engine chooses its operations once; the one without finds no
compiler. Arms take turns, so that a noisy machine hurts both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from load_tests.engine_bench import EngineBench, write_adapter
from server.model.default_model import prepare_default_model

CASES = {"1 base": (1, 0), "1 on 1": (1, 1), "8 base": (8, 0), "8 on 8": (8, 8), "32 base": (32, 0), "32 on 8": (32, 8)}
ARMS = {"C++": {}, "torch": {"CXX": "/nowhere/c++"}}
NEW_TOKENS = 12


def seconds_per_step(adapters: int = 8) -> dict[str, float]:
    """By case: the median of the engine's own decode steps."""
    with tempfile.TemporaryDirectory() as folder:
        bench = EngineBench(Path(folder) / "data", NEW_TOKENS)
        base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
        digests = [bench.bring(write_adapter(base, Path(folder) / str(i), rank=16, seed=i)) for i in range(adapters)]
        return {name: _median_step(bench, rows, digests[:used]) for name, (rows, used) in CASES.items()}


def _median_step(bench: EngineBench, rows: int, digests: list[str]) -> float:
    adapters = [digests[row % len(digests)] if digests else None for row in range(rows)]
    return statistics.median(bench.decode_steps([[5, 6, 7 + row] for row in range(rows)], adapters, NEW_TOKENS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(seconds_per_step()))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name, environment in ARMS.items():
            command = [sys.executable, "-m", "load_tests.cpu_path", "--arm"]
            said = subprocess.run(
                command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, timeout=300
            ).stdout
            found[name].append(json.loads(said.splitlines()[-1]))
    for case in CASES:
        times = {name: [run[case] for run in runs] for name, runs in found.items()}
        ratios = [slow / fast for slow, fast in zip(times["torch"], times["C++"], strict=True)]
        middle = {name: f"{statistics.median(values) * 1e3:.0f} ms" for name, values in times.items()}
        print(
            f"{case:8}  {middle}  {statistics.median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()

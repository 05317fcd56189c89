"""The engine of this checkout beside that of another one, in turns: what a change costs a step.

    python -m load_tests.engine_pairs OTHER_CHECKOUT [--rounds 6] [--tokens 48]

Each checkout runs `load_tests.engine_bench` in a process of its own, over the embedded model and the same adapters. In
every round each case runs in both, in alternating order; a ratio above 1 says that this checkout is faster.
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

from load_tests.engine_bench import write_adapter
from load_tests.peers.setting import machine
from server.model.loading.default_model import prepare_default_model

CASES = [(1, 0), (1, 1), (8, 0), (8, 8), (32, 8)]  # streams, adapters
RANK = 16
CHILD = """
import json, sys, tempfile
from pathlib import Path
from load_tests.engine_bench import EngineBench

with tempfile.TemporaryDirectory() as folder:
    bench = EngineBench(Path(folder), int(sys.argv[1]))
    digests = [bench.bring(Path(adapter)) for adapter in sys.argv[2:]]
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        streams, adapters = json.loads(line)
        uses = [digests[i % adapters] if adapters else None for i in range(streams)]
        print(json.dumps(bench.run(uses)), flush=True)
    bench.engine.close()
"""


class Engine:
    """The engine of one checkout in a child process."""

    def __init__(self, checkout: Path, tokens: int, adapters: list[Path]):
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", CHILD, str(tokens), *map(str, adapters)]
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, streams: int, adapters: int) -> float:
        """Return tokens per second of all streams together."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([streams, adapters]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
        adapters = [write_adapter(base, Path(folder) / str(seed), RANK, seed) for seed in range(8)]
        engines = [Engine(checkout.absolute(), options.tokens, adapters) for checkout in (Path(), options.other)]
        print(machine())
        compare(engines, options.rounds)
        for engine in engines:
            engine.close()


def compare(engines: list[Engine], rounds: int) -> None:
    for case in CASES:
        for engine in engines:
            engine.run(*case)  # warms up
        measured: list[list[float]] = [[], []]
        for number in range(rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                measured[index].append(engines[index].run(*case))
        ratios = [own / other for own, other in zip(*measured, strict=True)]
        own, other = map(statistics.median, measured)
        print(
            f"{case[0]} streams on {case[1]} adapters: {own:.1f} tok/s, the other {other:.1f}; ratio "
            f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

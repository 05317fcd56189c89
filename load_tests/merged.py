"""Tokens per second of one adapter merged into the base's weights, beside the base's and the unmerged adapter's.

    python -m load_tests.merged [--streams 8] [--rank 16] [--new-tokens 64] [--rounds 5]

One engine over SmolLM2 in this process. In every round each of the three runs once, so that a noisy machine hurts all;
the ratios are medians of the rounds' own.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from load_tests.engine_bench import EngineBench, write_adapter
from server.ipc.messages import Merge, Unmerge
from server.model.loading.default_model import prepare_default_model

Ratios = dict[str, list[float]]


def measure(bench: EngineBench, digest: str, streams: int, rounds: int) -> Ratios:
    ratios: Ratios = {"merged / base": [], "unmerged / base": []}
    for round_ in range(-1, rounds):  # the first one warms up
        base, unmerged = bench.run([None] * streams), bench.run([digest] * streams)
        merge = bench.switch(Merge(0, digest))
        merged = bench.run([digest] * streams)
        unmerge = bench.switch(Unmerge(1))
        print(
            f"{'warm-up' if round_ < 0 else f'round {round_ + 1}'}  base {base:.1f}  merged {merged:.1f}  "
            f"unmerged {unmerged:.1f} tok/s  (merging {merge:.2f} s, unmerging {unmerge * 1000:.1f} ms)",
            flush=True,
        )
        if round_ >= 0:
            ratios["merged / base"].append(merged / base)
            ratios["unmerged / base"].append(unmerged / base)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("streams", 8), ("rank", 16), ("new-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
        bench = EngineBench(Path(folder) / "data", options.new_tokens)
        digest = bench.add(write_adapter(base, Path(folder) / "adapter", options.rank, seed=0))
        ratios = measure(bench, digest, options.streams, options.rounds)
        bench.engine.close()
    for name, found in ratios.items():
        print(f"{name}: median {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()

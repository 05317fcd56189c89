"""Measure decode steps in every form of the native code that this machine can run, and without native code.

    python -m load_tests.cpu_path [--rounds 3] [--forms avx512,avx2,none] [--out FILE]

SmolLM2 in bf16. Each form is measured in a process of its own, since a process chooses its form once. Forms take turns,
so that a noisy machine hurts all of them. The ratios are to the best form, in the same round.
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

from adapters.device.forms import FORCED, FORMS, NONE, why_not
from load_tests.engine_bench import EngineBench, write_adapter
from load_tests.peers.setting import machine
from server.model.loading.default_model import prepare_default_model

CASES = {"1 base": (1, 0), "1 on 1": (1, 1), "8 base": (8, 0), "8 on 8": (8, 8), "32 base": (32, 0), "32 on 8": (32, 8)}
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


def measured(form: str) -> dict[str, float]:
    """Seconds per step by case, measured in a process that uses `form`."""
    command = [sys.executable, "-m", "load_tests.cpu_path", "--measure"]
    environment = {**os.environ, FORCED: form}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=600).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Milliseconds by case and form, and in brackets how many times as long as the first form of the same round."""
    forms = list(rounds[0])
    lines = [f"| case | {' | '.join(forms)} |", "| --- |" + " --- |" * len(forms)]
    for case in CASES:
        cells = []
        for form in forms:
            seconds = statistics.median(found[form][case] for found in rounds)
            ratio = statistics.median(found[form][case] / found[forms[0]][case] for found in rounds)
            cells.append(f"{seconds * 1e3:.1f} ({ratio:.2f})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", default=",".join([*(form.name for form in FORMS if not why_not(form)), NONE]))
    parser.add_argument("--out", type=Path, help="write JSON here, too")
    parser.add_argument("--measure", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(seconds_per_step()))
        return
    rounds = []
    for _ in range(options.rounds):
        rounds.append({form: measured(form) for form in options.forms.split(",")})
        print(table(rounds[-1:]), flush=True)
    print(f"medians of {options.rounds} rounds\n{table(rounds)}")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "seconds": rounds}, indent=1))


if __name__ == "__main__":
    main()

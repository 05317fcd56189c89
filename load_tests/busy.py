"""Measure what the engine keeps of its throughput on cores that it shares with busy loops.

    python -m load_tests.busy [--loops 0,2,4] [--streams 8] [--rounds 3] [--arm "NAME:VARIABLE=VALUE,…"]…

SmolLM2 in bf16, decoding greedily in the engine's own process, so that its threads are set up as in a server. `--loops`
are the busy loops that run beside it, each a process of its own. The fair share of the cores is cores / (cores +
loops); the table shows the throughput beside the loops as a part of that share of the quiet throughput of the same
round. Each `--arm` is a set of environment variables to compare; arms take turns within a round."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server import config as settings
from server.engine import worker

NEW_TOKENS = 48
FIXED = "BUSY_FIXED"  # set: the number of threads does not follow what the steps show


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(streams: int, loops: list[int], fixed: bool) -> dict[int, float]:
    """Throughput of `streams` streams of the base model beside each number of busy loops, after some seconds of it."""
    worker._bind_threads(settings.load({}))  # before torch is loaded
    from load_tests.engine_bench import EngineBench
    from server.engine.threads import adaptive_threads

    with tempfile.TemporaryDirectory() as folder:
        bench = EngineBench(Path(folder), NEW_TOKENS)
        if not fixed:
            bench.after_step = adaptive_threads("cpu")
        bench.run([None] * streams)
        found = {}
        for count in loops:
            with busy_loops(count):
                bench.run([None] * streams)
                found[count] = bench.run([None] * streams)
        bench.engine.close()
        return found


def run_arm(environment: dict[str, str], streams: int, loops: list[int]) -> dict[int, float]:
    command = [sys.executable, "-m", "load_tests.busy", "--measure", "--streams", str(streams)]
    command += ["--loops", ",".join(map(str, loops))]
    printed = subprocess.run(
        command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, timeout=600
    )
    return {int(count): value for count, value in json.loads(printed.stdout.splitlines()[-1]).items()}


def fair_part(found: dict[int, float], loops: int, cores: int) -> float:
    """Throughput beside `loops` busy loops, as a part of the fair share of the quiet throughput."""
    return found[loops] / found[0] * (cores + loops) / cores


def parsed_arm(text: str) -> tuple[str, dict[str, str]]:
    name, _, variables = text.partition(":")
    return name, dict(pair.split("=", 1) for pair in variables.split(",") if pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loops", default="0,2,4")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", action="append", type=parsed_arm, default=[])
    parser.add_argument("--measure", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    loops = [int(count) for count in args.loops.split(",")]
    if args.measure:
        print(json.dumps(tokens_per_second(args.streams, loops, FIXED in os.environ)))
        return
    arms, cores = dict(args.arm) or {"as it is": {}}, len(os.sched_getaffinity(0))
    found: dict[str, list[dict[int, float]]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, environment in arms.items():
            found[name].append(run_arm(environment, args.streams, loops))
            print(f"{name}: { ({count: round(value, 1) for count, value in found[name][-1].items()}) }", flush=True)
    for name, rounds in found.items():
        for count in loops:
            speed = statistics.median(run[count] for run in rounds)
            part = statistics.median(fair_part(run, count, cores) for run in rounds)
            print(f"{name:20} {count} loops  {speed:7.1f} tokens/s  {part:.2f} of the fair share")


if __name__ == "__main__":
    main()

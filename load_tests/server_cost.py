"""What the server costs beside its own engine, and how long it takes from its start to its first answer.

    python -m load_tests.server_cost [--streams 1,8,32] [--rounds 3] [--starts 3] [--out FILE]

The same prompts, adapters and 64 tokens go to an engine in this process and to `loraplex serve` over HTTP, in turn; the
ratios are of each round's tokens per second. The starts are of a server whose model was prepared before, without
adapters, to the end of an answer of one token.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from transformers import AutoTokenizer

from load_tests.engine_bench import EngineBench
from load_tests.own_server import serving
from load_tests.peers.__main__ import CACHE
from load_tests.peers.ground import Ground, prepare
from load_tests.peers.loraplex import Loraplex
from load_tests.peers.setting import BASE, CASES, NEW_TOKENS, Case, machine


class Pair:
    """Both of them, over the same model and adapters."""

    def __init__(self, ground: Ground):
        self._tokenizer = AutoTokenizer.from_pretrained(ground.base)
        self._engine = EngineBench(ground.work / "engine", NEW_TOKENS)
        self._digests = {folder.name: self._engine.add(folder) for folder in ground.adapters}
        self._server = Loraplex(ground)
        self.version = self._server.version

    def ratio(self, case: Case, round_: int) -> float:
        """The server's throughput to the engine's."""
        prompts = [self._tokenizer(prompt).input_ids for prompt in case.prompts(round_)]
        engine = self._engine.run([self._digests.get(model) for model in case.models()], prompts)
        server = self._server.run(case, round_).tokens_per_second
        print(f"round {round_ + 1}  {case.name:8}  engine {engine:.1f}  server {server:.1f} tok/s", flush=True)
        return server / engine

    def stop(self) -> None:
        self._server.stop()
        self._engine.engine.close()


def start_seconds() -> dict[str, float]:
    """From the start of the command to readiness, and to the end of the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with serving(Path(folder), "--served-model-name", BASE) as url:
            ready = time.perf_counter()
            body = {"model": BASE, "prompt": "The capital of France is", "max_tokens": 1}
            httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
            return {"ready": ready - started, "first_answer": time.perf_counter() - started}


def measure(cases: list[Case], rounds: int, starts: int, cache: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        pair = Pair(prepare(cache, Path(work)))
        try:
            for case in cases:  # to warm up
                pair.ratio(case, -1)
            ratios = {case.name: [pair.ratio(case, round_) for round_ in range(rounds)] for case in cases}
        finally:
            pair.stop()
    about = {"machine": machine(), "version": pair.version}
    return {**about, "server_to_engine": ratios, "start_seconds": [start_seconds() for _ in range(starts)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, help="write JSON here, too")
    args = parser.parse_args()
    cases = [case for case in CASES if str(case.streams) in args.streams.split(",")]
    found = measure(cases, args.rounds, args.starts, args.cache)
    for name, ratios in found["server_to_engine"].items():
        print(f"{name}: {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    for start in found["start_seconds"]:
        print(f"start: ready after {start['ready']:.1f} s, first answer after {start['first_answer']:.1f} s")
    if args.out:
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


if __name__ == "__main__":
    main()

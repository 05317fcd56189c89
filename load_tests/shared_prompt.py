"""What n outputs of one prompt cost until each has its first token, beside one output.

    python -m load_tests.shared_prompt [--n 16] [--tokens 512] [--rounds 10]

SmolLM2 in bf16 in the engine's own process. Rounds of one output and of n alternate, each with a new prompt. Exit code
1: the n outputs take more than 1.2 times the processor time, or compute more than n - 1 tokens beyond the prompt.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from load_tests.engine_bench import EngineBench
from server.engine import worker
from server.ipc.messages import Abort, StepOutputs, Submit
from server.request import SamplingParams

MOST = 1.2


def first_tokens(bench: EngineBench, prompt: list[int], n: int) -> tuple[float, int]:
    """Processor seconds until all n outputs have a token, and the tokens that were computed of their prompts."""
    engine, started, computed = bench.engine, time.process_time(), 0
    said: Counter[str] = Counter()
    for i in range(n):
        params = SamplingParams(max_tokens=8, temperature=1.0, seed=i, ignore_eos=True)
        engine.handle(Submit(f"{started}-{i}", prompt, params))
    while len(said) < n:
        step = engine.step()[0]
        assert isinstance(step, StepOutputs)
        computed += step.stats.batch_tokens
        said.update(output.seq_id for output in step.outputs)
    seconds = time.process_time() - started
    engine.handle(Abort(list(said)))
    bench.settle()
    return seconds, computed - sum(said.values()) + n


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    from server import config

    worker._bind_threads(config.load({}))
    ratios, extra = [], []
    with tempfile.TemporaryDirectory() as folder:
        bench = EngineBench(Path(folder), 1, dtype="bfloat16")
        generator = torch.Generator().manual_seed(0)
        for turn in range(options.rounds + 1):
            one, many = torch.randint(100, 40_000, (2, options.tokens), generator=generator).tolist()
            alone, _ = first_tokens(bench, one, 1)
            together, computed = first_tokens(bench, many, options.n)
            if turn:  # the first round warms up
                ratios.append(together / alone)
                extra.append(computed - options.tokens)
        bench.engine.close()
    ratio = statistics.median(ratios)
    print(f"{options.n} outputs of a prompt of {options.tokens} tokens: {ratio:.2f} times the processor time of one")
    print(
        f"median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}; {max(extra)} tokens beyond the prompt"
    )
    if ratio > MOST or max(extra) > options.n - 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Measure the gaps of chat streams beside long prompts, with a fixed token budget and with `--max-step-ms`.

    python -m load_tests.long_prompts [--streams 8] [--prompt 2000] [--prompts 2] [--rounds 2] [--large]

One engine over SmolLM2 in this process, or with `--large` over a random Llama of 1.1B in bf16, with as many threads as
a server would use beside other programs. The two rules take turns in every round, so that a noisy machine hurts both.
A prompt alone is measured as well: no stream runs beside it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from load_tests.peers.setting import commit, machine
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.scheduling.step_cost import StepBudget
from server.engine.threads import adaptive_threads
from server.ipc.messages import Abort, StepOutputs, Submit
from server.model.loading.default_model import prepare_default_model
from server.request import SamplingParams

CHAT_TOKENS = 70
STEPS_BETWEEN = 10  # of decode, between two long prompts
FIXED, TARGET, ALONE = "fixed budget", "target", "alone"
LARGE = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
    vocab_size=32000, max_position_embeddings=8192,
)  # fmt: skip


@dataclass
class Found:
    """What streams and prompts saw under one rule. Seconds; `tokens` are computed ones."""

    gaps: list[float] = field(default_factory=list)  # between two tokens of a stream, while a long prompt was computed
    quiet_gaps: list[float] = field(default_factory=list)  # with none
    first_tokens: list[float] = field(default_factory=list)  # of the long prompts
    seconds: float = 0.0  # while a long prompt was computed
    tokens: int = 0  # computed in them

    def row(self, name: str) -> str:
        def of(values: Sequence[float], share: float) -> str:
            return f"{np.percentile(values, share) * 1e3:.0f}" if values else ""

        cells = [of(self.quiet_gaps, 50), of(self.gaps, 50), of(self.gaps, 99), of(self.gaps, 100)]
        speed = self.tokens / self.seconds
        return f"| {name} | {' | '.join(cells)} | {float(np.median(self.first_tokens)):.2f} | {speed:.0f} |"


HEAD = (
    "| rule | gap without a prompt, ms | gap p50 | p99 | longest | first token of a prompt, s | tokens/s |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


class Bench:
    """An engine, its streams, and when each of them got its last token."""

    def __init__(self, model: Path, data_dir: Path, max_step_ms: float):
        self.engine, self._info = build_engine(ServeConfig(model=str(model), data_dir=data_dir))
        device = self._info.description["device"].partition(":")[0]
        self._budgets = {FIXED: StepBudget(), TARGET: StepBudget.for_device(max_step_ms, device)}
        self._budgets[ALONE] = self._budgets[TARGET]
        self._adapt = adaptive_threads(device)
        self._generator = torch.Generator().manual_seed(0)
        self._number = 0
        self._last: dict[str, float] = {}

    def measure(self, rule: str, streams: int, prompt_tokens: int, prompts: int, found: Found) -> None:
        self.engine.scheduler.step_budget = self._budgets[rule]
        names = [self._submit(CHAT_TOKENS, 100_000) for _ in range(streams)]
        while not all(name in self._last for name in names):
            self._step()
        for _ in range(prompts):
            for _ in range(STEPS_BETWEEN if streams else 0):
                found.quiet_gaps += self._step()[1]
            self._prompt(prompt_tokens, found)
        self.engine.handle(Abort(names))
        self._last.clear()
        while self.engine.has_work():
            self._step()

    def _prompt(self, tokens: int, found: Found) -> None:
        started, name = time.perf_counter(), self._submit(tokens, 1)
        while name not in self._last:
            computed, gaps = self._step()
            found.gaps += gaps
            found.tokens += computed
        found.first_tokens.append(self._last[name] - started)
        found.seconds += time.perf_counter() - started

    def _submit(self, tokens: int, max_tokens: int) -> str:
        self._number += 1
        prompt = torch.randint(100, self._info.vocab_size - 1000, (tokens,), generator=self._generator).tolist()
        limit = min(max_tokens, self._info.max_model_len - tokens)
        params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
        self.engine.handle(Submit(str(self._number), prompt, params))
        return str(self._number)

    def _step(self) -> tuple[int, list[float]]:
        """Run a step; return the number of its tokens, and the gaps that end with it."""
        said = self.engine.step()[0]
        now, gaps = time.perf_counter(), []
        assert isinstance(said, StepOutputs)
        self._adapt(said.stats.step_seconds)
        for output in said.outputs:
            assert output.error is None, output.error
            if output.token_ids:
                if output.seq_id in self._last:
                    gaps.append(now - self._last[output.seq_id])
                self._last[output.seq_id] = now
        return said.stats.batch_tokens, gaps


def table(results: dict[str, Found]) -> str:
    return "\n".join([HEAD, *(found.row(name) for name, found in results.items())])


def write_large(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LARGE).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("streams", 8), ("prompt", 2000), ("prompts", 2), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-step-ms", type=float, default=0.0)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path, help="write JSON here, too")
    options = parser.parse_args()
    results = {rule: Found() for rule in (FIXED, TARGET, ALONE)}
    with tempfile.TemporaryDirectory() as folder:
        model = write_large(Path(folder) / "model") if options.large else prepare_default_model()
        bench = Bench(model, Path(folder) / "data", options.max_step_ms)
        for round_ in range(options.rounds):
            for rule in (FIXED, TARGET) if round_ % 2 == 0 else (TARGET, FIXED):
                bench.measure(rule, options.streams, options.prompt, options.prompts, results[rule])
            bench.measure(ALONE, 0, options.prompt, options.prompts, results[ALONE])
            print(f"round {round_ + 1}\n{table(results)}", flush=True)
        bench.engine.close()
    if options.out:
        about = {"machine": machine(), "commit": commit(), "options": {**vars(options), "out": None}}
        options.out.write_text(json.dumps({**about, "found": {k: asdict(v) for k, v in results.items()}}, indent=1))


if __name__ == "__main__":
    main()

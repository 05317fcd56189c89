"""Tokens per second of one adapter merged into the base's weights, beside the base's and the unmerged adapter's.

    python -m load_tests.merged [--streams 8] [--rank 16] [--new-tokens 64] [--rounds 5]

One engine over SmolLM2 in this process. In every round each of the three runs once, so that a noisy machine hurts all;
the ratios are medians of the rounds' own.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from adapters.store import AdapterStore
from adapters.validation import inspect
from load_tests.versus_peft import Setting, write_adapters
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.messages import Merge, Reply, Submit, ToEngine, Unmerge
from server.model.default_model import prepare_default_model
from server.sequence import SamplingParams

PROMPT_TOKENS = 70
Ratios = dict[str, list[float]]


class Bench:
    """An engine with one random adapter on all linears."""

    def __init__(self, setting: Setting, folder: Path):
        model = prepare_default_model()
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        adapter = write_adapters(base, folder, setting)[0]
        self._setting = setting
        self._engine, info = build_engine(ServeConfig(model=str(model), data_dir=folder / "data"))
        store = AdapterStore(folder / "data" / "store")
        with store.stage() as staged:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (staged / name).write_bytes((adapter / name).read_bytes())
            self.digest = inspect(staged, info.spec).digest
            store.admit(staged, self.digest)
        self._round = 0

    def run(self, adapter: str | None) -> float:
        """Tokens per second, new prompts every time; the adapter is on the device already."""
        setting, self._round = self._setting, self._round + 1
        generator = torch.Generator().manual_seed(self._round)
        params = SamplingParams(max_tokens=setting.new_tokens, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        for i in range(setting.streams):
            prompt = torch.randint(100, 40_000, (PROMPT_TOKENS,), generator=generator).tolist()
            self._engine.handle(Submit(f"{self._round}-{i}", prompt, params, adapter))
        _settle(self._engine)
        return setting.streams * setting.new_tokens / (time.perf_counter() - started)

    def switch(self, request: ToEngine) -> float:
        """Seconds until the engine says that it is done."""
        started = time.perf_counter()
        self._engine.handle(request)
        replies = _settle(self._engine)
        assert [reply.error for reply in replies] == [None]
        return time.perf_counter() - started

    def close(self) -> None:
        self._engine.residency.close()


def _settle(engine: Engine) -> list[Reply]:
    replies = []
    while engine.has_work():
        said = engine.step()
        replies += [message for message in said if isinstance(message, Reply)]
        if engine.merging.status.state == "preparing":
            time.sleep(0.002)  # as the engine's loop does
    return replies


def measure(bench: Bench, rounds: int) -> Ratios:
    ratios: Ratios = {"merged / base": [], "unmerged / base": []}
    for round_ in range(-1, rounds):  # the first one warms up
        base, unmerged = bench.run(None), bench.run(bench.digest)
        merge = bench.switch(Merge(0, bench.digest))
        merged = bench.run(bench.digest)
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
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Setting(adapters=1, **options), Path(folder))
        ratios = measure(bench, rounds)
        bench.close()
    for name, found in ratios.items():
        print(f"{name}: median {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()

"""Tokens per second of one batch of eight different kinds of adapter, beside eight plain LoRAs and the bare base.

    python -m load_tests.kinds [--rank 16] [--new-tokens 64] [--rounds 5]

One engine over SmolLM2 in this process, eight streams. In every round each runs once, so that a noisy machine hurts
all; the ratios are medians of the rounds' own.
"""

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from load_tests.engine_bench import EngineBench
from server.model.loading.default_model import prepare_default_model

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA with patterns": {"use_rslora": True, "alpha_pattern": {"q_proj": 24}},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "trained tokens": {"trainable_token_indices": [3, 4, 5]},
    "saved norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "IA3": {},
}


def write(base: nn.Module, kind: str, rank: int, folder: Path, seed: int) -> Path:
    """A random adapter on all linears, as PEFT saves it."""
    torch.manual_seed(seed)
    config: Any = LoraConfig(
        **{"r": rank, "lora_alpha": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **KINDS[kind]}
    )
    if kind == "IA3":
        config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("rank", 16), ("new-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
        bench = EngineBench(Path(folder) / "data", options.new_tokens)
        kinds = [bench.add(write(base, kind, options.rank, Path(folder) / kind, 0)) for kind in KINDS]
        seeds = range(1, len(KINDS) + 1)
        plain = [bench.add(write(base, "LoRA", options.rank, Path(folder) / f"plain{i}", i)) for i in seeds]
        del base
        measure(bench, kinds, plain, options.rounds)
        bench.engine.close()


def measure(bench: EngineBench, kinds: list[str], plain: list[str], rounds: int) -> None:
    ratios: dict[str, list[float]] = {"8 kinds / 8 plain": [], "8 plain / base": []}
    for round_ in range(-1, rounds):  # the first one warms up
        own, other, base = bench.run(kinds), bench.run(plain), bench.run([None] * len(plain))
        print(f"{'warm-up' if round_ < 0 else f'round {round_ + 1}'}  8 kinds {own:.1f}  8 plain {other:.1f}  "
              f"base {base:.1f} tok/s", flush=True)  # fmt: skip
        if round_ >= 0:
            ratios["8 kinds / 8 plain"].append(own / other)
            ratios["8 plain / base"].append(other / base)
    alone = {kind: bench.run([digest] * len(kinds)) for kind, digest in zip(KINDS, kinds, strict=True)}
    for kind, speed in alone.items():
        print(f"8 streams of {kind} alone: {speed / alone['LoRA']:.2f} of plain LoRA's")
    for name, found in ratios.items():
        print(f"{name}: median {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()

"""Tokens per second of one batch of eight different kinds of adapter, beside eight plain LoRAs and the bare base.

    python -m load_tests.kinds [--rank 16] [--new-tokens 64] [--rounds 5] [--experts]

One engine over SmolLM2 in this process, or with `--experts` over a random Mixtral of a similar size; eight streams. In
every round each runs once, so that a noisy machine hurts all; the ratios are medians of the rounds' own.
"""

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from load_tests.engine_bench import EngineBench
from server.model.loading.default_model import prepare_default_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = MixtralConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=9,
    num_key_value_heads=3,
    num_local_experts=8,
    num_experts_per_tok=2,
    tie_word_embeddings=True,
)


def plain_lora(rank: int, experts: bool, **changes: Any) -> LoraConfig:
    targets = ATTENTION if experts else [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def kinds_of(rank: int, experts: bool) -> dict[str, PeftConfig]:
    """Return eight kinds for the base."""
    ia3_inputs = [] if experts else ["down_proj"]
    own: dict[str, PeftConfig] = {"lora_bias": plain_lora(rank, experts, lora_bias=True)}
    if experts:
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        own = {"expert LoRA": plain_lora(rank, experts, target_parameters=stacks)}
    return {
        "LoRA": plain_lora(rank, experts),
        "DoRA": plain_lora(rank, experts, use_dora=True),
        **own,
        "embedding": plain_lora(rank, experts, target_modules=["embed_tokens", *ATTENTION]),
        "trained tokens": plain_lora(rank, experts, trainable_token_indices=[3, 4, 5]),
        "IA3": IA3Config(target_modules=["k_proj", "v_proj", *ia3_inputs], feedforward_modules=ia3_inputs),
        "OFT": OFTConfig(oft_block_size=32, target_modules=ATTENTION),
        "cartridge": CartridgeConfig(num_virtual_tokens=128, task_type="CAUSAL_LM"),
    }


def write(base: nn.Module, config: PeftConfig, folder: Path, seed: int) -> Path:
    """Write a random adapter, as PEFT saves it."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def saved_base(experts: bool, folder: Path) -> Path:
    if not experts:
        return prepare_default_model()
    torch.manual_seed(0)
    MixtralForCausalLM(EXPERTS).bfloat16().save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("rank", 16), ("new-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = saved_base(options.experts, folder / "base")
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        bench = EngineBench(folder / "data", options.new_tokens, model=str(path))
        configs, lora = kinds_of(options.rank, options.experts), plain_lora(options.rank, options.experts)
        kinds = {kind: bench.add(write(base, config, folder / kind, 0)) for kind, config in configs.items()}
        plain = [bench.add(write(base, lora, folder / f"plain{i}", i)) for i in range(1, len(kinds) + 1)]
        del base
        measure(bench, kinds, plain, options.rounds)
        bench.engine.close()


def measure(bench: EngineBench, kinds: dict[str, str], plain: list[str], rounds: int) -> None:
    ratios: dict[str, list[float]] = {"8 kinds / 8 plain": [], "8 plain / base": []}
    for round_ in range(-1, rounds):  # the first one warms up
        own, other, base = bench.run([*kinds.values()]), bench.run(plain), bench.run([None] * len(plain))
        print(f"{'warm-up' if round_ < 0 else f'round {round_ + 1}'}  8 kinds {own:.1f}  8 plain {other:.1f}  "
              f"base {base:.1f} tok/s", flush=True)  # fmt: skip
        if round_ >= 0:
            ratios["8 kinds / 8 plain"].append(own / other)
            ratios["8 plain / base"].append(other / base)
    alone = {kind: bench.run([digest] * len(plain)) for kind, digest in kinds.items()}
    for kind, speed in alone.items():
        print(f"8 streams of {kind} alone: {speed / alone['LoRA']:.2f} of plain LoRA's")
    for name, found in ratios.items():
        print(f"{name}: median {statistics.median(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()

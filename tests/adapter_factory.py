"""Small base models and PEFT adapters for tests: random, seeded, written by the real PEFT."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.model_spec import ModelSpec


@contextmanager
def _peft_asks_old_names() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 deprecates; nothing of ours could avoid the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*`ensure_weight_tying` is not set to True")  # it is tested so
        yield


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random float32 Llama of 2 layers with grouped-query attention; `changes` override its config."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def write_adapter(
    model: nn.Module,
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 0.05,
    vocab_size: int | None = None,
    save_embedding_layers: bool | str = False,
    **lora_config: Any,
) -> Path:
    """Save a PEFT LoRA adapter with random non-zero A and B in `folder`, and everything else that it trains moved away
    from where it starts; `model` stays as it was.

    `scale` is the standard deviation of B, `vocab_size` that of the model when it is resized for the adapter;
    `lora_config` goes to `peft.LoraConfig` (default: rank 8, alpha 16, q_proj and v_proj). Returns `folder`.
    """
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with _peft_asks_old_names(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = resized(copy.deepcopy(model), vocab_size)
        peft_model = get_peft_model(own, LoraConfig(**copy.deepcopy({**settings, **lora_config})))
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                nn.init.normal_(parameter, std=scale)
            elif "lora_magnitude_vector" in name:
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            elif "lora_A" not in name and parameter.requires_grad:
                parameter.data += (0.3 if parameter.dim() == 1 else scale) * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape: .*lora_B.bias")  # PEFT takes it for a broken factor
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def write_peft_adapter(
    model: nn.Module,
    folder: Path,
    config: PeftConfig,
    *,
    seed: int = 0,
    scale: float = 0.2,
    save_embedding_layers: bool | str = False,
) -> Path:
    """Save a PEFT adapter of any type in `folder`, with all that is trained moved away at random from where it starts,
    `scale` being the standard deviation; `model` stays as it was. Returns `folder`."""
    config, ranks_left = copy.deepcopy(config), None
    if isinstance(config, AdaLoraConfig):
        ranks_left, config.rank_pattern = config.rank_pattern, None  # which training finds
    with _peft_asks_old_names(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(copy.deepcopy(model), config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += scale * torch.randn_like(parameter)
    if ranks_left is not None:
        config.rank_pattern = ranks_left
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape: .*\\(0, ")  # a layer that lost every rank
        peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def resized(model: nn.Module, vocab_size: int | None) -> Any:
    """`model` with embeddings of that size; the new rows are random."""
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)  # type: ignore[operator]
    return model


def with_peft(model: nn.Module, folder: Path, vocab_size: int | None = None) -> PeftModel:
    """A copy of `model` with the adapter of `folder` attached by PEFT: what our own answers are compared with."""
    with _peft_asks_old_names(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were ignored: .*lora_E", category=RuntimeWarning)  # used later
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")  # GPT-2's layers, once quantised
        return PeftModel.from_pretrained(resized(copy.deepcopy(model), vocab_size), str(folder)).eval()


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens of transformers' own greedy `generate`, which is made to go on past any end token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def spec_of(model: nn.Module, max_rank: int = 64) -> ModelSpec:
    """Every `nn.Linear` of `model` as an adaptable module, and every parameter as one that may be replaced."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = {
        name: {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
        for name, module in model.named_modules()
    }
    named = dict(model.named_modules())
    embedding = next((name for name in parameters if name.endswith(("embed_tokens", "wte"))), "")
    return ModelSpec(
        modules={name: (module.in_features, module.out_features) for name, module in linears.items()},
        max_rank=max_rank,
        biased=frozenset(name for name, module in linears.items() if module.bias is not None),
        parameters={name: shapes for name, shapes in parameters.items() if shapes},
        embedding=embedding,
        head="lm_head",
        tied="lm_head" in named and named["lm_head"].weight is named[embedding].weight,
    )

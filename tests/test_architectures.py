"""Every architecture on the list, as a tiny random model: greedy tokens are those of `generate`, one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from server.model.loading.loader import ModelRefused
from tests.fixtures.adapter_factory import greedy, with_peft, write_adapter
from tests.fixtures.engine_driver import make_driver

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama-tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {**SIZES, **HEADS, "sliding_window": 8}),
    "qwen2-biases": ("Qwen2", SIZES),
    "qwen2-window": ("Qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3-norms": ("Qwen3", {**SIZES, **HEADS}),
    "gemma2": (
        "Gemma2",
        {**SIZES, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "gemma3": (
        "Gemma3",
        {**SIZES, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "phi3-fused": ("Phi3", SIZES),
    "gpt2-conv1d": ("GPT2", {**SIZES, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    "gpt-neox": ("GPTNeoX", SIZES),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}


def config_of(kind: str) -> PreTrainedConfig:
    name, sizes = ARCHITECTURES[kind]
    drop = {"intermediate_size", "num_key_value_heads"} if name == "GPT2" else set()
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return getattr(transformers, config_name)(**{k: v for k, v in sizes.items() if k not in drop})


def build(kind: str) -> PreTrainedModel:
    name = ARCHITECTURES[kind][0]
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config_of(kind)).eval()


PROMPTS = [
    list(range(3, 8)),
    [50, 4, 9, 77, 31, 8, 15, 60, 61, 62, 63, 7, 5, 90, 91, 3, 4, 5, 6],
    [42],
    list(range(3, 40)),
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    """Sequences of different lengths in one batch, prefilled in chunks of 16 tokens, with and without an adapter."""
    model = build(kind)
    model.save_pretrained(tmp_path / "model")
    # PEFT turns "all-linear" on Mixtral into LoRA on the experts' own parameters, which is not plain LoRA.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind == "mixtral" else "all-linear"
    adapter = write_adapter(
        model, tmp_path / "adapter", target_modules=targets, r=4, scale=0.3, fan_in_fan_out=kind == "gpt2-conv1d"
    )
    driver = make_driver(tmp_path / "model", tmp_path, max_batch_tokens=16)
    digest = driver.add_adapter(adapter)
    for index, prompt in enumerate(PROMPTS):
        driver.submit(f"base-{index}", prompt, max_tokens=16)
        driver.submit(f"lora-{index}", prompt, digest, max_tokens=16)
    driver.run()
    tuned = with_peft(model, adapter)
    for index, prompt in enumerate(PROMPTS):
        assert driver.tokens(f"base-{index}") == greedy(model, prompt, 16), prompt
        assert driver.tokens(f"lora-{index}") == greedy(tuned, prompt, 16), prompt
    assert driver.tokens("base-0") != driver.tokens("lora-0")


def test_a_model_whose_attention_is_not_causal_is_refused(tmp_path: Path) -> None:
    sizes = {**SIZES, **HEADS, "sliding_window": 8, "use_bidirectional_attention": True}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelRefused, match="bidirectional"):
        make_driver(tmp_path / "model", tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelRefused):
        make_driver(tmp_path / "model", tmp_path)


def test_a_state_space_model_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelRefused):
        make_driver(tmp_path / "model", tmp_path)


def test_rope_that_depends_on_length_is_served_within_its_original_length(tmp_path: Path) -> None:
    """Beyond it, one long request would change the rotary frequencies of every other row."""
    half = 16 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 64,
    }
    config = transformers.Phi3Config(**{**SIZES, "rope_parameters": rope, "original_max_position_embeddings": 64})
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "model")
    assert make_driver(tmp_path / "model", tmp_path).info.max_model_len == 64
    with pytest.raises(ModelRefused, match="--max-model-len 65"):
        make_driver(tmp_path / "model", tmp_path, max_model_len=65)

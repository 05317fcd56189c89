"""A checkpoint that is not whole is refused: transformers would fill its gaps with random numbers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model.loading.loader import ModelRefused, load_model
from tests.fixtures.adapter_factory import tiny_llama

UP = "model.layers.{}.mlp.up_proj.weight"


def changed(folder: Path, changes: dict[str, torch.Tensor | None]) -> str:
    """Write a tiny model whose file has other tensors in place of some of its own, or lacks them."""
    tiny_llama().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({UP.format(1): None}, f"'{UP.format(1)}' is missing"),
        ({UP.format(0): torch.ones(3, 64)}, f"'{UP.format(0)}' is [3, 64] and not [112, 64]"),
        ({"lm_head.weight": None, "model.norm.weight": None}, "'lm_head.weight' is missing, 'model.norm.weight' is m"),
    ],
)
def test_a_checkpoint_with_missing_or_misshapen_weights_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, changes: dict[str, torch.Tensor], told: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelRefused, match=re.escape(told)):
        load_model(changed(tmp_path / "model", changes), "float32", quantization, "cpu", 0)


def test_tied_weights_are_not_missing_and_tensors_of_no_module_do_no_harm(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    assert load_model(str(tmp_path), "float32", "none", "cpu", 0).head == "lm_head"

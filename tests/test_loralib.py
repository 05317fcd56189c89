"""Checkpoints of loralib. The formulas of its layers are written out here: the library itself is not needed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.convert.loralib import Layers, convert, read_checkpoint
from adapters.load import load
from adapters.model_spec import ModelSpec
from tests.fixtures.adapter_factory import with_peft

MASK = (True, False, True)
ALPHA, R, SIZE = 6, 4, 32


def merged_delta(a: Tensor, b: Tensor, mask: tuple[bool, ...], outputs: int) -> Tensor:
    """loralib's MergedLinear: a grouped convolution, padded with zeros where a part is not enabled."""
    delta = functional.conv1d(a.unsqueeze(0), b.unsqueeze(-1), groups=sum(mask)).squeeze(0)
    whole = torch.zeros(outputs, a.shape[1])
    rows = torch.tensor(mask).repeat_interleave(outputs // len(mask))
    whole[rows] = delta
    return whole


def c_attn(mask: tuple[bool, ...] = MASK, r: int = R) -> dict[str, Tensor]:
    parts = sum(mask)
    a, b = torch.randn(r * parts, SIZE), torch.randn(3 * SIZE // len(mask) * parts, r)
    return {"transformer.h.0.attn.c_attn.lora_A": a, "transformer.h.0.attn.c_attn.lora_B": b}


def converted(state: dict[str, Tensor], folder: Path, layers: Layers, alpha: float = ALPHA) -> Path:
    folder.mkdir()
    plain_lora.save(folder, *convert(state, alpha, layers))
    return folder


def delta(folder: Path, module: str) -> Tensor:
    """Return the delta that the server adds to a module's weight."""
    factors = plain_lora.read(folder)[module]
    return factors.scaling * factors.b @ factors.a


@pytest.mark.parametrize("mask", [MASK, (True, True, True), (False, True, False), (False, True), (True,)])
def test_a_merged_linear_is_one_lora(mask: tuple[bool, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    outputs = 3 * SIZE // len(mask) * len(mask)
    (a_name, a), (_, b) = (state := c_attn(mask)).items()
    folder = converted(state, tmp_path / "made", Layers({"c_attn": mask}))
    expected = ALPHA / R * merged_delta(a, b, mask, outputs)
    torch.testing.assert_close(delta(folder, a_name.removesuffix(".lora_A")), expected)


def test_gpt2_computes_the_same_through_peft(tmp_path: Path) -> None:
    """A linear, a merged one and trained biases in one model, against a base with the deltas in its weights."""
    torch.manual_seed(0)
    sizes: Any = {"n_embd": SIZE, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    proj = "transformer.h.0.mlp.c_proj"
    a, b = (state := c_attn()).values()
    state |= {f"{proj}.lora_A": torch.randn(2, 4 * SIZE), f"{proj}.lora_B": torch.randn(SIZE, 2)}
    state |= {f"{proj}.bias": torch.randn(SIZE), "transformer.h.0.attn.c_attn.bias": torch.randn(3 * SIZE)}
    torch.save({"model_state_dict": state}, tmp_path / "checkpoint.pt")
    folder = converted(read_checkpoint(tmp_path / "checkpoint.pt"), tmp_path / "made", Layers({"c_attn": MASK}))
    tokens = torch.arange(20).unsqueeze(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        answer = with_peft(model, folder)(input_ids=tokens).logits
        block = model.transformer.h[0]
        block.attn.c_attn.weight += ALPHA / R * merged_delta(a, b, MASK, 3 * SIZE).T
        block.attn.c_attn.bias.copy_(state["transformer.h.0.attn.c_attn.bias"])
        block.mlp.c_proj.weight += ALPHA / 2 * (state[f"{proj}.lora_B"] @ state[f"{proj}.lora_A"]).T
        block.mlp.c_proj.bias.copy_(state[f"{proj}.bias"])
        torch.testing.assert_close(answer, model(input_ids=tokens).logits)
    modules = {"transformer.h.0.attn.c_attn": (SIZE, 3 * SIZE), proj: (4 * SIZE, SIZE)}
    assert set(load(folder, ModelSpec(modules, 64, frozenset(modules))).biases) == set(modules)


def test_names_are_renamed_and_embeddings_called_so(tmp_path: Path) -> None:
    state = {"tok.lora_A": torch.randn(R, 50), "tok.lora_B": torch.randn(SIZE, R)}
    state |= {"enc.0.q.lora_A": torch.randn(2, SIZE), "enc.0.q.lora_B": torch.randn(SIZE, 2)}
    save_file(state, tmp_path / "checkpoint.safetensors")
    layers = Layers(embeddings=["tok"], renames={"enc.": "model.layers.", "tok": "model.embed_tokens"})
    folder = converted(read_checkpoint(tmp_path / "checkpoint.safetensors"), tmp_path / "made", layers)
    found = load_file(folder / "adapter_model.safetensors")
    assert set(found) == {
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.layers.0.q.lora_A.weight",
        "base_model.model.model.layers.0.q.lora_B.weight",
    }
    assert torch.equal(found["base_model.model.model.embed_tokens.lora_embedding_B"], state["tok.lora_B"])


A, B = "x.q.lora_A", "x.q.lora_B"
GOOD = {A: torch.ones(2, 6), B: torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("changes", "layers", "says"),
    [
        ({"x.q.weight": torch.ones(6, 6)}, Layers(), "x.q.weight"),
        ({"x.norm.bias": torch.ones(6)}, Layers(), "x.norm.bias"),
        ({"x.q.lora_ind": torch.ones(6)}, Layers(), "x.q.lora_ind"),
        ({"x.k.lora_A": torch.ones(2, 6)}, Layers(), "x.k has no lora_B"),
        ({"x.k.lora_B": torch.ones(2, 6)}, Layers(), "x.k.lora_B"),
        ({A: torch.ones(4, 6)}, Layers(), "need --enable-lora"),
        ({}, Layers({"q": (True, True)}), "do not fit its --enable-lora"),
        ({}, Layers({"k": (True,)}), "no module of the checkpoint fits 'k'"),
        ({}, Layers(embeddings=["wte"]), "fits 'wte'"),
        ({}, Layers(renames={"y.": ""}), "fits 'y.'"),
        ({"y.lora_A": GOOD[A], "y.lora_B": GOOD[B]}, Layers(renames={"x.q": "y"}), "two modules are renamed to y"),
        ({A: torch.ones(2, 6, 1)}, Layers(), "matrices"),
        ({"x.q.bias": torch.ones(5)}, Layers(), "a bias"),
        ({A: torch.ones(2, 6, dtype=torch.float64)}, Layers(), "x.q.lora_A is torch.float64"),
    ],
)
def test_unconvertible_tensors_are_named(changes: dict[str, Tensor], layers: Layers, says: str) -> None:
    convert(GOOD, ALPHA, Layers())
    with pytest.raises(FolderError, match=says):
        convert(GOOD | changes, ALPHA, layers)


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueR."])
def test_files_that_are_no_tensors(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FolderError):
        read_checkpoint(tmp_path / name)


def test_checkpoints_that_are_something_else(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"step": 3, "lora_A": torch.ones(1)}, tmp_path / "mixed.pt")
    for name in ("list.pt", "mixed.pt", "absent.pt"):
        with pytest.raises(FolderError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FolderError, match="no lora_A"):
        convert({}, ALPHA, Layers())

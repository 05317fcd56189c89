"""Conversion of LoRA adapters in GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes them.

The tensors have llama.cpp's names (`blk.0.attn_q.weight.lora_a`), which gguf's table maps from those of the base model.
The factor is alpha / rank, or 1 without alpha. Architectures of Llama's family have the rows of q and k in another
order, because llama.cpp rotates neighbouring pairs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError

# Architectures whose linear layers llama.cpp stores as they are, or with the rows of q and k permuted.
_PLAIN = ("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "starcoder2")
_PERMUTED = ("llama", "granite")
_ENDINGS = (".lora_a", ".lora_b")


@dataclass(frozen=True, slots=True)
class BaseLinears:
    """The linear layers `(in, out)` of a base model by name, and its numbers of layers and attention heads."""

    linears: Mapping[str, tuple[int, int]]
    layers: int
    heads: int
    kv_heads: int


def convert(file: Path, base: BaseLinears) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of the PEFT adapter that computes the same function. Raises `FolderError`."""
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: _dequantized(tensor) for tensor in reader.tensors}
    except Exception as error:  # the errors of gguf on malformed bytes have no common base class
        raise FolderError(f"{file} cannot be read as GGUF ({type(error).__name__})") from None
    architecture, alpha = _settings(file, fields)
    names = _names(architecture, base)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    for target in _targets(stored):
        a, b = (stored.get(f"{target}{ending}") for ending in _ENDINGS)
        module = names.get(target.removesuffix(".weight"))
        if module is None or a is None or b is None:
            raise FolderError(f"{target} has no pair of factors, or is no linear layer of this base model")
        _check_shapes(module, a, b, base)
        if architecture in _PERMUTED and target.endswith((".attn_q.weight", ".attn_k.weight")):
            b = _unpermuted(b, base.heads if ".attn_q." in target else base.kv_heads)
        scales[module] = len(a), alpha or len(a)
        tensors.update(zip(plain_lora.pair_names(module), (a, b), strict=True))
    config = plain_lora.config_of(scales)
    if invocation := fields.get(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS):
        config["alora_invocation_tokens"] = [int(token) for token in invocation]
    return config, tensors


def _dequantized(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def _settings(file: Path, fields: Mapping[str, Any]) -> tuple[str, float]:
    """Return the architecture and alpha."""
    kind = fields.get(gguf.Keys.General.TYPE), fields.get(gguf.Keys.Adapter.TYPE)
    if kind != (gguf.GGUFType.ADAPTER, "lora"):
        raise FolderError(f"{file} is no LoRA adapter: its general.type is {kind[0]!r}, its adapter.type {kind[1]!r}")
    architecture = str(fields.get(gguf.Keys.General.ARCHITECTURE))
    if architecture not in (*_PLAIN, *_PERMUTED):
        known = ", ".join(sorted((*_PLAIN, *_PERMUTED)))
        raise FolderError(f"{file} is for the architecture {architecture[:40]!r}; those that can be converted: {known}")
    return architecture, float(fields.get(gguf.Keys.Adapter.LORA_ALPHA) or 0)


def _names(architecture: str, base: BaseLinears) -> dict[str, str]:
    """Return the base model's names of linear layers by llama.cpp's, both without `.weight`."""
    arch = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, base.layers)
    pairs = {table.get_name(module): module for module in base.linears}
    return {name: module for name, module in pairs.items() if name is not None}


def _targets(stored: Iterable[str]) -> list[str]:
    if odd := next((name for name in stored if not name.endswith(_ENDINGS)), None):
        raise FolderError(f"{odd} is no factor of a LoRA, which alone can be converted")
    targets = sorted({name.rpartition(".")[0] for name in stored})
    if not targets:
        raise FolderError("there is no tensor in the file")
    return targets


def _check_shapes(module: str, a: Tensor, b: Tensor, base: BaseLinears) -> None:
    inputs, outputs = base.linears[module]
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], len(b), len(a)) != (inputs, outputs, b.shape[1]):
        raise FolderError(f"{module}: {list(a.shape)} and {list(b.shape)} do not fit this base's {[outputs, inputs]}")


def _unpermuted(b: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of each head: first half and second half alternate."""
    return b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)

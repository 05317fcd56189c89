"""Conversion of checkpoints of loralib, Microsoft's LoRA library, to PEFT adapters.

loralib's `Linear` and `Embedding` hold A `[r, in]` and B `[out, r]`. `MergedLinear`, one layer for several projections
(GPT-2's q, k and v), has a separate A for each enabled part, stacked as `[parts * r, in]`, and their B as `[parts * out
/ all parts, r]`; a grouped convolution multiplies them. This equals one LoRA of rank `parts * r` whose B is zero
outside its blocks. The scaling alpha / r is not stored.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.convert.pickles import read_pickle
from adapters.errors import AdapterInvalid
from adapters.peft.patterns import dotted_suffixes
from adapters.peft.safetensors_header import read_header

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Layers:
    """Properties of the modules that a checkpoint does not store.

    `enabled` has the `enable_lora` of each MergedLinear; its keys and `embeddings` are dotted endings of module names
    in the checkpoint. `renames` maps prefixes of names to those of transformers; the first match counts.
    """

    enabled: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    embeddings: Collection[str] = ()
    renames: Mapping[str, str] = field(default_factory=dict)

    def mask(self, module: str) -> tuple[bool, ...] | None:
        """Return the `enable_lora` of `module`; None if it is no MergedLinear."""
        return next((self.enabled[name] for name in dotted_suffixes(module) if name in self.enabled), None)

    def is_embedding(self, module: str) -> bool:
        """Return True if `module` is an embedding."""
        return not set(self.embeddings).isdisjoint(dotted_suffixes(module))

    def renamed(self, module: str) -> str:
        """Return the name of `module` in transformers."""
        fitting = (old for old in self.renames if module.startswith(old))
        return next((self.renames[old] + module.removeprefix(old) for old in fitting), module)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` file or of a file written by `torch.save`. Raises `FolderError`."""
    if not path.is_file():
        raise FolderError(f"{path} is no file")
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except AdapterInvalid as error:
            raise FolderError(str(error)) from None
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    return read_pickle(path)


def convert(state: Mapping[str, Tensor], alpha: float, layers: Layers) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of the PEFT adapter that computes the same function; `alpha` is that of the
    training.

    Raises `FolderError` for a tensor that a PEFT adapter cannot hold, and for shapes that do not fit.
    """
    if odd := next((name for name, tensor in state.items() if tensor.dtype not in _DTYPES), None):
        raise FolderError(f"{odd} is {state[odd].dtype}, not float32, float16 or bfloat16")
    modules, biases = _grouped(state)
    scales: dict[str, tuple[int, float]] = {}
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in modules.items():
        mask, name = layers.mask(module), layers.renamed(module)
        if name in scales:
            raise FolderError(f"two modules are renamed to {name}")
        _check_shapes(module, a, b, mask)
        factors = a, _blocks(b, mask)
        if module in biases and biases[module].shape != (len(factors[1]),):
            raise FolderError(f"{module}: a bias {list(biases[module].shape)} beside {len(factors[1])} outputs")
        scales[name] = len(a), alpha * (len(a) // b.shape[1])
        tensors.update(zip(_names(name, layers.is_embedding(module)), factors, strict=True))
    tensors |= {f"base_model.model.{layers.renamed(module)}.base_layer.bias": bias for module, bias in biases.items()}
    _check_all_used(layers, modules)
    return plain_lora.config_of(scales) | {"bias": "lora_only" if biases else "none"}, tensors


def _grouped(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B by module, and the biases of these modules."""
    modules = {name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")}
    known = {f"{module}.{kind}" for module in modules for kind in ("lora_A", "lora_B", "bias")}
    if strange := next((name for name in state if name not in known), None):
        raise FolderError(f"{strange}: only lora_A with its lora_B, and the biases of such layers, can be converted")
    if incomplete := next((module for module in sorted(modules) if f"{module}.lora_B" not in state), None):
        raise FolderError(f"{incomplete} has no lora_B beside its lora_A")
    if not modules:
        raise FolderError("there is no lora_A in the checkpoint")
    ordered = sorted(modules)
    factors = {module: (state[f"{module}.lora_A"], state[f"{module}.lora_B"]) for module in ordered}
    return factors, {module: state[f"{module}.bias"] for module in ordered if f"{module}.bias" in state}


def _check_shapes(module: str, a: Tensor, b: Tensor, mask: tuple[bool, ...] | None) -> None:
    parts = sum(mask) if mask else 1
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
        raise FolderError(f"{module}: lora_A and lora_B are matrices, not {list(a.shape)} and {list(b.shape)}")
    if len(a) != parts * b.shape[1] or len(b) % parts:
        hint = "do not fit its --enable-lora" if mask else "need --enable-lora if this is a MergedLinear"
        raise FolderError(f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} {hint}")


def _blocks(b: Tensor, mask: tuple[bool, ...] | None) -> Tensor:
    """Return B `[out, parts * r]` with each enabled part's rows in its own columns."""
    if mask is None:
        return b
    rows, r = len(b) // sum(mask), b.shape[1]
    whole = b.new_zeros(rows * len(mask), r * sum(mask))
    places = (index for index, enabled in enumerate(mask) if enabled)
    for part, place in enumerate(places):
        whole[place * rows : (place + 1) * rows, part * r : (part + 1) * r] = b[part * rows : (part + 1) * rows]
    return whole


def _names(module: str, is_embedding: bool) -> tuple[str, str]:
    prefix = f"base_model.model.{module}"
    if is_embedding:
        return f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"
    return plain_lora.pair_names(module)


def _check_all_used(layers: Layers, modules: Collection[str]) -> None:
    endings = {ending for module in modules for ending in dotted_suffixes(module)}
    beginnings = [old for old in layers.renames if not any(module.startswith(old) for module in modules)]
    unused = [*sorted({*layers.enabled, *layers.embeddings} - endings), *beginnings]
    if unused:
        raise FolderError(f"no module of the checkpoint fits {unused[0]!r}")

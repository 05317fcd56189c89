"""Conversion of adapters of mlx-lm: `out += scale * x @ lora_a @ lora_b`, with A `[in, r]` and B `[r, out]`, and DoRA's
`m` as PEFT's magnitude. Source: mlx-lm, `tuner/lora.py`, `tuner/dora.py`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.errors import AdapterInvalid
from adapters.peft.files import CONFIG_FILE
from adapters.peft.foreign_files import MLX_FILE
from adapters.peft.safetensors_header import FLOAT_BYTES, read_header, unique_keys

_KINDS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}


def convert(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of the PEFT adapter that computes the same function. Raises `FolderError`."""
    kind, scale = _settings(folder / CONFIG_FILE)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    for module, parts in sorted(_modules(folder / MLX_FILE, _KINDS[kind]).items()):
        a, b = parts["lora_a"].T, parts["lora_b"].T
        scales[module] = len(a), scale * len(a)
        tensors.update(zip(plain_lora.pair_names(module), (a, b), strict=True))
        if kind == "dora":
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = parts["m"]
    return plain_lora.config_of(scales) | {"use_dora": kind == "dora"}, tensors


def _settings(path: Path) -> tuple[str, float]:
    """Return the kind of the adapter and its scale."""
    try:
        config = json.loads(path.read_text(), object_pairs_hook=unique_keys)
        kind, settings = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        scale = float(settings["scale"])
    except (ValueError, AttributeError, KeyError, TypeError):
        raise FolderError(f"{path} is no config of mlx-lm with lora_parameters and their scale") from None
    if kind not in _KINDS:
        raise FolderError(f"{path}: fine_tune_type {str(kind)[:40]!r} is no adapter; {' and '.join(_KINDS)} are")
    if "alpha" in settings:
        raise FolderError(
            f"{path} has an alpha, by which some versions of mlx-lm multiply the scale and others do not: remove it, "
            "and set scale to the factor of the training (scale * alpha / rank, or scale)"
        )
    if not math.isfinite(scale):
        raise FolderError(f"{path}: scale is {scale}")
    return kind, scale


def _modules(path: Path, kinds: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by module, complete and of fitting shapes."""
    try:
        read_header(path, FLOAT_BYTES)
        state = load_file(path)
    except (AdapterInvalid, OSError) as error:
        raise FolderError(f"{path}: {error}") from None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if kind not in kinds or not module:
            raise FolderError(f"{name} is no tensor of an adapter with {', '.join(kinds)}")
        found.setdefault(module, {})[kind] = tensor
    for module, parts in found.items():
        _check(module, parts, kinds)
    return found


def _check(module: str, parts: Mapping[str, Tensor], kinds: tuple[str, ...]) -> None:
    if missing := next((kind for kind in kinds if kind not in parts), None):
        raise FolderError(f"{module} has no {missing}")
    a, b = parts["lora_a"], parts["lora_b"]
    if module.rpartition(".")[2] in ("embed_tokens", "wte"):
        raise FolderError(f"{module} is an embedding, whose adapter mlx-lm also applies to a tied head, unlike PEFT")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise FolderError(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are no pair of matrices")

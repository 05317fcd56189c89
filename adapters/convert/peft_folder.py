"""PEFT folders of plain LoRA, read and written without a base model: the tensors give the sizes of its modules."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.convert.folders import FolderError
from adapters.errors import AdapterInvalid
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import MAX_CONFIG_BYTES, MAX_RANK
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE
from adapters.peft.lora_config import parse_config
from adapters.peft.safetensors_header import FLOAT_BYTES, read_header
from adapters.peft.spellings import peft_names
from adapters.peft.tensor_names import parse_tensor_name
from adapters.weights import LoraFactors


def read(folder: Path, origin: Path | None = None) -> dict[str, LoraFactors]:
    """Return the factors of every module, validated as the server validates them; messages name `origin` as the folder.

    Raises `FolderError` if the folder holds no adapter, a malformed one, or one with more than A and B.
    """
    origin = origin or folder
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FolderError(f"{origin} has no {' and no '.join(missing)}")
    try:
        with (folder / CONFIG_FILE).open("rb") as file:
            settings, problems = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        if problems or settings is None:
            raise AdapterInvalid(problems)
        if not settings.traits().additive:
            raise FolderError(f"{origin}: only plain A and B can be used, and it has {', '.join(settings.features)}")
        return load(folder, _own_spec(folder / WEIGHTS_FILE)).factors
    except AdapterInvalid as error:
        raise FolderError(f"{origin}: {error}") from None


def _own_spec(weights: Path) -> ModelSpec:
    """Return the spec of a base model that has exactly the adapter's own modules."""
    sizes: dict[str, dict[str, tuple[int, ...]]] = {}
    header = read_header(weights, FLOAT_BYTES)
    names = peft_names(header, ()).names
    for name, info in header.items():
        if parsed := parse_tensor_name(names[name]):
            sizes.setdefault(parsed[0], {})[parsed[1]] = info.shape
    pairs = {module: (kinds["A"], kinds["B"]) for module, kinds in sizes.items() if {"A", "B"} <= kinds.keys()}
    return ModelSpec({module: (a[-1], b[0]) for module, (a, b) in pairs.items() if a and b}, MAX_RANK)


def config_of(scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return an `adapter_config.json` for modules with these ranks and alphas."""
    r, alpha = Counter(scales.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(scales),
        "rank_pattern": {f"^{module}": rank for module, (rank, _) in scales.items() if rank != r},
        "alpha_pattern": {f"^{module}": own for module, (_, own) in scales.items() if own != alpha},
    }


def pair_names(module: str) -> tuple[str, str]:
    """Return PEFT's names for A and B of a linear layer."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )

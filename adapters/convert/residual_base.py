"""Conversion of adapters trained on a residual base: PiSSA, OLoRA, CorDA and LoRA-GA start with factors A0 and B0
that are not zero and subtract them from the base, `W_res = W − s·B0 A0`. On the unmodified W the same model is `s·(B
A − B0 A0) = s·[B, −B0] [A; A0]`: plain LoRA of twice the rank. Source: PEFT, `LoraModel.subtract_mutated_init`."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.convert.initial_factors import check_deterministic, initial_factors
from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.peft.safetensors_header import unique_keys
from adapters.weights import LoraFactors

RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga")
# Keys that only configure the initialisation.
_INIT_KEYS = ("corda_config", "lora_ga_config")


def convert(trained: Path, initial: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of the plain adapter that has the same effect on the unmodified base as `trained`
    has on its residual base.

    `initial` is the adapter as it was saved before training. Raises `FolderError`.
    """
    config, factors = _read(trained)
    return _combined(config, factors, _read(initial)[1], f"{initial} is not what {trained} began with")


def convert_with_base(trained: Path, base: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same without the adapter from before training, where the weights of the base model determine it.
    Raises `FolderError`."""
    init = check_convertible(trained)
    config, factors = _read(trained)
    start = initial_factors(init, factors, base)
    return _combined(config, factors, start, f"this is not the base model that {trained} was trained on")


def _combined(
    config: dict[str, Any], factors: Mapping[str, LoraFactors], start: Mapping[str, LoraFactors], otherwise: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if {m: _form(f) for m, f in factors.items()} != {m: _form(f) for m, f in start.items()}:
        raise FolderError(f"{otherwise}: its modules, ranks or alphas are others")
    tensors: dict[str, Tensor] = {}
    for module, own in factors.items():
        a = torch.cat([own.a, start[module].a], dim=0)
        b = torch.cat([own.b, -start[module].b], dim=1)
        tensors.update(zip(plain_lora.pair_names(module), (a, b), strict=True))
    return _doubled(config), tensors


def _form(factors: LoraFactors) -> tuple[torch.Size, torch.Size, float]:
    return factors.a.shape, factors.b.shape, factors.scaling


def begins_beside_residual(folder: Path) -> bool:
    """Return whether the adapter in `folder` says that its base model was changed. Raises `FolderError`."""
    return str(_config(folder).get("init_lora_weights")).startswith(RESIDUAL_INITS)


def check_convertible(folder: Path) -> str:
    """Return the initialisation of the adapter in `folder`. Raises `FolderError` unless the base determines it."""
    init = _config(folder).get("init_lora_weights", True)
    check_deterministic(init)
    return str(init)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(), object_pairs_hook=unique_keys)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise FolderError(f"{folder / CONFIG_FILE} is no JSON object")
    return config


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, LoraFactors]]:
    """Return the config, changed to that of a plain adapter, and the factors."""
    config = _config(folder)
    start = config.get("init_lora_weights", True)
    if start is not True and not str(start).startswith(RESIDUAL_INITS):
        # LoftQ's base is also quantised, which no sum of factors can undo.
        raise FolderError(
            f"{folder} was initialised by {start!r}, which cannot be converted: {', '.join(RESIDUAL_INITS)} can"
        )
    plain = config | {"init_lora_weights": True} | {key: None for key in _INIT_KEYS}
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / CONFIG_FILE).write_text(json.dumps(plain))
        (Path(temporary) / WEIGHTS_FILE).symlink_to((folder / WEIGHTS_FILE).resolve())
        return plain, plain_lora.read(Path(temporary), folder)


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """Double the ranks at the same scaling, which is alpha / √rank with rslora."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    patterns = {"rank_pattern": 2, "alpha_pattern": factor}
    return config | {
        "r": config.get("r", 8) * 2,
        "lora_alpha": config.get("lora_alpha", 8) * factor,
        **{key: {n: v * by for n, v in (config.get(key) or {}).items()} for key, by in patterns.items()},
    }

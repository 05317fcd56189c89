"""The factors that PiSSA and OLoRA begin with, computed by PEFT from the weights of the base model.

The SVD and the QR decomposition leave the signs of the factors open, but not their product, which is all that counts.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.convert.folders import FolderError
from adapters.weights import LoraFactors

DETERMINISTIC = ("pissa", "olora")


def check_deterministic(init: Any) -> None:
    """Raise `FolderError` for an initialisation that the base model alone does not determine."""
    if init in DETERMINISTIC:
        return
    reason = "begins with random numbers" if str(init).startswith("pissa_niter") else "cannot be computed from the base"
    raise FolderError(
        f"init_lora_weights {init!r} {reason}, as {' and '.join(DETERMINISTIC)} can: give the adapter from before "
        "training with --initial"
    )


def initial_factors(init: str, trained: Mapping[str, LoraFactors], base: nn.Module) -> dict[str, LoraFactors]:
    """Return what `trained` had before its training. Raises `FolderError`."""
    return {module: _initial(init, module, own, base) for module, own in trained.items()}


def _initial(init: str, module: str, own: LoraFactors, base: nn.Module) -> LoraFactors:
    from peft import LoraConfig, inject_adapter_in_model

    rank = len(own.a)
    skeleton = nn.ModuleDict({"m": copy.deepcopy(_layer(module, base))})  # a copy, because PEFT changes its weight
    config = LoraConfig(
        r=rank,
        lora_alpha=own.scaling * rank,
        target_modules=["m"],
        init_lora_weights=init,
        fan_in_fan_out=isinstance(skeleton["m"], Conv1D),
    )
    inject_adapter_in_model(config, skeleton)
    layer: Any = skeleton["m"]
    a, b = (factor["default"].weight.detach() for factor in (layer.lora_A, layer.lora_B))
    return LoraFactors(a, b, own.scaling)


def _layer(module: str, base: nn.Module) -> nn.Module:
    try:
        layer = base.get_submodule(module)
    except AttributeError:
        raise FolderError(f"the base model has no module {module}") from None
    if not isinstance(layer, nn.Linear | Conv1D):
        raise FolderError(f"the base model's {module} is no linear layer")
    return layer

"""DoRA and trained biases, folded at load into what a step can apply cheaply.

PEFT computes `y = b + g ⊙ (W x + s·B A x) + s·c` with `g = magnitude / ‖W + s·B A‖` by rows (1 without DoRA), `b` the
trained bias or else the base's, `c` the bias of lora_B or else 0. Here g goes into B, and over the base's own output
there remains `y ← g ⊙ y + shift`, the output vectors of a module.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.peft.weights import LoraFactors

_ROWS = 1024  # of a weight, taken to float32 at a time


def dora_scale(base: nn.Module, factors: LoraFactors) -> Tensor | None:
    """g, `[out]` in float32; None for a module without DoRA."""
    if factors.magnitude is None:
        return None
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in updated_rows(dense_weight(base), factors)]
    return factors.magnitude.float() / torch.cat(norms).cpu()


def updated_rows(weight: Tensor, factors: LoraFactors) -> Iterator[Tensor]:
    """W + s·B A in float32, some rows at a time."""
    a = factors.a.to(weight.device, torch.float32)
    b = factors.b.to(weight.device, torch.float32) * factors.scaling
    for rows, b_rows in zip(torch.split(weight, _ROWS), torch.split(b, _ROWS), strict=True):
        yield torch.addmm(rows.float(), b_rows, a)


def output_vectors(
    base: nn.Module, scale: Tensor | None, factors: LoraFactors | None, bias: Tensor | None
) -> Tensor | None:
    """g and shift, `[2, out]` in float32; None where the base's output stays as it is."""
    lora_bias = None if factors is None else factors.bias
    given = [vector for vector in (scale, lora_bias, bias) if vector is not None]
    if not given:
        return None
    base_bias: Tensor | None = base.bias  # type: ignore[assignment]
    own = torch.zeros_like(given[0], dtype=torch.float32) if base_bias is None else base_bias.float().cpu()
    scale = torch.ones_like(own) if scale is None else scale
    shift = (own if bias is None else bias.float()) - scale * own
    if factors is not None and lora_bias is not None:
        shift += lora_bias.float() * factors.scaling
    return torch.stack([scale, shift])


def dense_weight(base: nn.Module) -> Tensor:
    """The weight `[out, in]`, whichever way the layer holds it: quantised, or transposed as GPT-2's Conv1D does."""
    weight: Tensor = base.weight.data  # type: ignore[assignment]
    if isinstance(base, Conv1D):
        return weight.T
    state = quant_state(base)
    return weight if state is None else _dequantised(weight, state)


def quant_state(base: nn.Module) -> Any:
    """bitsandbytes' description of a 4-bit weight; None for any other."""
    return getattr(base.weight, "quant_state", None)


def _dequantised(weight: Tensor, quant_state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(quant_state, "packing_format_for_cpu", False):
        weight, quant_state = _unpacked(weight, quant_state)
    dequantised: Tensor = dequantize_4bit(weight, quant_state)
    return dequantised


def _unpacked(weight: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
    """bitsandbytes reorders a weight for its bf16 CPU kernel on first use, and its dequantisation does not look."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(quant_state)  # the inverse changes the state that it is given
    state.original_nested = False  # nor shall it quantise the block scales a second time
    weight, state = _convert_weight_packed_for_cpu_inverse(weight, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return weight, state

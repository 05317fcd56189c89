"""DoRA and trained biases, reduced at load to a scaled B and one scale and shift per output.

PEFT computes `y = b + g ⊙ (W x + s·B A x) + s·c` with `g = magnitude / ‖W + s·B A‖` by rows (1 without DoRA), `b` the
trained bias or else the base's, `c` the bias of lora_B or else 0. Here g is folded into B, and the base's own output
needs `y ← g ⊙ y + shift`, the output vectors of a module.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.weights import LoraFactors

_ROWS = 1024  # rows of a weight that are converted to float32 at a time


def dora_scale(base: nn.Module, factors: LoraFactors) -> Tensor | None:
    """Return g, `[out]` in float32 on the host; None for a module without DoRA."""
    if factors.magnitude is None:
        return None
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in updated_rows(dense_weight(base), factors)]
    return factors.magnitude.float() / torch.cat(norms).cpu()


def updated_rows(weight: Tensor, factors: LoraFactors) -> Iterator[Tensor]:
    """Yield the rows of W + s·B A in float32, up to 1024 at a time, on the device of `weight`."""
    a = factors.a.to(weight.device, torch.float32)
    b = factors.b.to(weight.device, torch.float32) * factors.scaling
    for rows, b_rows in zip(torch.split(weight, _ROWS), torch.split(b, _ROWS), strict=True):
        yield torch.addmm(rows.float(), b_rows, a)


def output_vectors(
    base: nn.Module, scale: Tensor | None, factors: LoraFactors | None, bias: Tensor | None
) -> Tensor | None:
    """Return g and shift, `[2, out]` in float32; None where the base's output is unchanged."""
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
    """Return the weight `[out, in]` of a layer that stores it dense, quantised, or transposed as GPT-2's Conv1D
    does."""
    weight: Tensor = base.weight.data  # type: ignore[assignment]
    if isinstance(base, Conv1D):
        return weight.T
    state = quant_state(base)
    return weight if state is None else _dequantised(weight, state)


def quant_state(base: nn.Module) -> Any:
    """Return bitsandbytes' description of a 4-bit weight; None for any other weight."""
    return getattr(base.weight, "quant_state", None)


def _dequantised(weight: Tensor, quant_state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(quant_state, "packing_format_for_cpu", False):
        weight, quant_state = _unpacked(weight, quant_state)
    dequantised: Tensor = dequantize_4bit(weight, quant_state)
    return dequantised


def _unpacked(weight: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
    """Undo the reordering that bitsandbytes applies to a weight for its bf16 CPU kernel on first use, which its
    dequantisation does not handle."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(quant_state)  # the inverse modifies the state passed to it
    state.original_nested = False  # otherwise it would quantise the block scales a second time
    weight, state = _convert_weight_packed_for_cpu_inverse(weight, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return weight, state

"""The weight of a linear with row maps merged into it, for merged mode."""

import torch
from torch import Tensor

from adapters.runtime.row_maps import RotatedBlocks, RowMaps

_CHUNK = 1024  # rows or columns of a weight that are computed in float32 at a time


def mapped_weight(weight: Tensor, maps: RowMaps, scale: Tensor | None) -> Tensor:
    """Return the weight `[out, in]` of the linear with its maps, in the dtype of `weight`; `scale [out]` multiplies its
    rows. Each number is computed in float32 and rounded once."""
    maps = maps.to(weight.device)
    return _with_outputs(weight, maps) if maps.before is None else _with_inputs(weight, maps, scale)


def mapped_bias(bias: Tensor | None, maps: RowMaps) -> Tensor | None:
    """Return the bias of the linear with its maps: what changes the outputs changes it, too."""
    if bias is None or maps.after is None:
        return bias
    mapped: Tensor = maps.to(bias.device).after(bias.float()[None])[0]  # type: ignore[misc]
    return mapped


def _with_inputs(weight: Tensor, maps: RowMaps, scale: Tensor | None) -> Tensor:
    """Return `g ⊙ (W Rᵀ)` for inputs that become `x R`."""
    assert isinstance(maps.before, RotatedBlocks), "no other map comes before the base"
    rotation = RotatedBlocks(maps.before.blocks.mT)
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, len(weight), _CHUNK):
        rows = rotation(weight[start : start + _CHUNK].float())
        if scale is not None:
            rows *= scale[start : start + _CHUNK, None].to(rows)
        merged[start : start + _CHUNK] = rows
    return merged


def _with_outputs(weight: Tensor, maps: RowMaps) -> Tensor:
    """Return the weight from the linear's outputs for the unit vectors of its inputs."""
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    inputs = weight.shape[1]
    for start in range(0, inputs, _CHUNK):
        outputs = weight[:, start : start + _CHUNK].float().T
        if maps.after is not None:
            outputs = maps.after(outputs)
        if maps.added is not None:
            units = torch.zeros(len(outputs), inputs, device=weight.device)
            units[torch.arange(len(outputs)), torch.arange(start, start + len(outputs))] = 1
            outputs = outputs + maps.added(units)
        merged[:, start : start + _CHUNK] = outputs.T
    return merged

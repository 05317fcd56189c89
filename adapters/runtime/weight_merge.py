"""Merging of one adapter into the base weights: new modules take the places of the base's own, which are not modified.

The merged weight is computed in float32 and rounded once: `W' = g ⊙ (W + s·B A)`, with the bias that follows from the
output vectors of `adapters.runtime.dora`. Unmerging restores the base bit for bit, because its modules are never
written to.
"""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import AdapterInvalid, MoveRefused, Problem
from adapters.runtime.base_factors import with_base
from adapters.runtime.dora import dense_weight, dora_scale, output_vectors, quant_state, updated_rows
from adapters.runtime.layers import LoRAGroup, LoRALinear
from adapters.runtime.mapped_weight import mapped_bias, mapped_weight
from adapters.runtime.row_maps import RowMaps, row_maps_of
from adapters.runtime.stacked_linear import Finish, stack
from adapters.weights import AdapterWeights, LoraFactors

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free bytes on the base's device, and on the host for modules moved off the device (0 when both are the same
    memory)."""

    device: int
    host: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """`requantized`: quantised layers are quantised again after the merge. `swapped`: merged and own modules take
    turns on the device."""

    requantized: bool
    swapped: bool


class MergedModules:
    """Modules with one version merged in. Call `install` and `restore` between two steps.

    If the device has no memory for both, the merged and the base's own modules are swapped: those not in use are in
    host memory.
    """

    def __init__(self, modules: dict[LoRAGroup, nn.Module], placement: Placement) -> None:
        self.requantized = placement.requantized
        self._merged = modules
        self._own: dict[LoRAGroup, nn.Module] = {group: group.base for group in modules}
        self._device = {group: dense_weight(group.member(0)).device for group in modules}
        self._swapped = placement.swapped

    def install(self) -> None:
        """Put the merged modules in place. Raises `MoveRefused`, with the base restored, when the device runs out of
        memory."""
        try:
            self._put(self._merged, self._own)
        except torch.OutOfMemoryError:
            self.restore()
            raise MoveRefused(
                "no_room", "the device ran out of memory while the merged weights were put in place"
            ) from None

    def restore(self) -> None:
        """Put the base's own modules back in place."""
        self._put(self._own, self._merged)

    def _put(self, incoming: Mapping[LoRAGroup, nn.Module], outgoing: Mapping[LoRAGroup, nn.Module]) -> None:
        for group, module in incoming.items():
            if self._swapped:
                _move(outgoing[group], _HOST)
                _move(module, self._device[group])
            group.replace_base(module)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move a module by creating new parameters; `Module.to` would also move every module that shares a parameter,
    such as a tied embedding."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            moved = parameter.to(device)
            owner._parameters[name] = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, False)


def merge(
    weights: AdapterWeights,
    layers: Mapping[str, LoRALinear],
    free: FreeMemory,
    finish: Finish,
    *,
    allow_requantize: bool = False,
) -> MergedModules:
    """Fold validated `weights` into modules for `layers`; 4-bit layers are dequantised where memory allows. `finish`
    turns a plain linear into the module that the device computes with. Runs in a thread beside the engine's steps.

    Raises `MoveRefused` ("no_room"), and `AdapterInvalid` when a merged weight overflows the base's dtype.
    """
    weights = with_base(weights, {name: layer.base for name, layer in layers.items()})
    maps = row_maps_of(weights)
    changed = sorted(weights.factors.keys() | weights.biases.keys() | maps.keys())
    groups = list(dict.fromkeys(layers[name].group for name in changed))
    placement = _place([group.base for group in groups], free, allow_requantize)
    modules = {}
    for group in groups:
        modules[group] = _merged_group(group, weights, maps, finish, placement.requantized)
        if placement.swapped:
            _move(modules[group], _HOST)
    return MergedModules(modules, placement)


def _place(bases: Collection[nn.Module], free: FreeMemory, allow_requantize: bool) -> Placement:
    """Place the merged modules beside the base's own if they fit, else swap them; dequantise if either of these
    fits. Raises `MoveRefused` if nothing fits."""
    own = sum(_nbytes(base) for base in bases)
    merged = sum(_merged_nbytes(base) for base in bases)
    quantized = any(quant_state(base) is not None for base in bases)
    for requantized, needed in ((False, merged), (True, own)):
        if requantized and not (quantized and allow_requantize):
            continue
        if needed <= free.device:
            return Placement(requantized, swapped=False)
        if needed - own <= free.device and max(needed, own) <= free.host:
            return Placement(requantized, swapped=True)
    hint = "; allow_requantize keeps them in 4 bits" if quantized and not allow_requantize else ""
    raise MoveRefused("no_room", f"the merged layers need {merged >> 20} MiB, which is more than is free{hint}")


def _merged_group(
    group: LoRAGroup, weights: AdapterWeights, maps: Mapping[str, RowMaps], finish: Finish, requantized: bool
) -> nn.Module:
    """Return the merged module of a group. Siblings that the adapter does not change are copied, because a stack is
    one matrix."""
    if len(group.names) > 1:
        members = [(group.member(index), name) for index, name in enumerate(group.names)]
        return stack([_merged_linear(base, name, weights, maps) for base, name in members], finish)
    base, (name,) = group.member(0), group.names
    if name not in weights.factors and name not in maps:
        return _with_bias(base, _merged_bias(base, output_vectors(base, None, None, weights.biases.get(name))))
    linear = _merged_linear(base, name, weights, maps)
    if requantized and quant_state(base) is not None:
        return _quantized(linear, base)
    return finish(linear)


def _merged_linear(base: nn.Module, name: str, weights: AdapterWeights, maps: Mapping[str, RowMaps]) -> nn.Linear:
    if name in maps:
        mapped = mapped_weight(dense_weight(base), maps[name], weights.weight_scales.get(name))
        return _linear(_finite(mapped), mapped_bias(base.bias, maps[name]))  # type: ignore[arg-type]
    factors, bias = weights.factors.get(name), weights.biases.get(name)
    scale = None if factors is None else dora_scale(base, factors)
    new_bias = _merged_bias(base, output_vectors(base, scale, factors, bias))
    weight = dense_weight(base)
    return _linear(weight if factors is None else _merged_weight(weight, factors, scale), new_bias)


def _merged_weight(weight: Tensor, factors: LoraFactors, scale: Tensor | None) -> Tensor:
    """Return the merged weight `[out, in]`, contiguous, in the dtype of `weight`. Raises `AdapterInvalid` on
    overflow."""
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    start = 0
    for rows in updated_rows(weight, factors):
        end = start + len(rows)
        if scale is not None:
            rows *= scale[start:end, None].to(rows.device)
        merged[start:end] = rows
        start = end
    return _finite(merged)


def _finite(merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise AdapterInvalid([Problem("weights", f"beyond {merged.dtype} once merged", "finite numbers", "nonfinite")])
    return merged


def _merged_bias(base: nn.Module, vectors: Tensor | None) -> Tensor | None:
    """Return `g ⊙ b₀ + shift` in float32, or the base's own bias where nothing changes it; None where there is none."""
    own: Tensor | None = base.bias  # type: ignore[assignment]
    if vectors is None:
        return own
    scale, shift = vectors
    if own is None:
        return shift if shift.any() else None
    return torch.addcmul(shift, scale, own.float().cpu())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a plain linear, also for a layer that stored its weight quantised or transposed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.device, weight.dtype), requires_grad=False)
    return linear.eval()


def _with_bias(base: nn.Module, bias: Tensor | None) -> nn.Module:
    """Return a copy of `base` with another bias; the weight is shared."""
    like: Tensor = dense_weight(base) if base.bias is None else base.bias  # type: ignore[assignment]
    assert bias is not None
    module = copy.copy(base)
    changed = nn.Parameter(bias.to(like.device, like.dtype), requires_grad=False)
    module._parameters = {**base._parameters, "bias": changed}
    return module


def _quantized(linear: nn.Linear, base: nn.Module) -> nn.Module:
    """Quantise `linear` to the 4-bit format of `base`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    old: Any = base.weight
    bias = linear.bias is not None
    module: nn.Module = Linear4bit(linear.in_features, linear.out_features, bias, base.compute_dtype, device="meta")
    weight = Params4bit(
        linear.weight.data,
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
        module=module,
    )
    module.weight = weight.to(linear.weight.device)
    module.bias = linear.bias
    return module.eval()


def _nbytes(base: nn.Module) -> int:
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.nbytes


def _merged_nbytes(base: nn.Module) -> int:
    """Return the size in bytes of the merged weight when it is not quantised."""
    state = quant_state(base)
    if state is None:
        return _nbytes(base)
    # In bitsandbytes' CPU layout, `state.dtype` is always bf16.
    dtype: torch.dtype = getattr(state, "original_dtype", state.dtype)
    numel: int = math.prod(state.shape)
    return numel * dtype.itemsize

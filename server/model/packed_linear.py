"""bf16 linears on a CPU with their weights in the layout that they are computed in.

That is our own kernel's, which beats torch's product wherever it was measured (docs/decisions.md). Where it cannot be
compiled, or would not use the bf16 arithmetic that the processor has, it is oneDNN's: `nn.Linear` reorders its weight
anew on every call, and doing it once gives the same product in about two thirds of the time at decode.
"""

from typing import TypeGuard

import torch
from torch import nn

from server.model.cpu.library import multiplies_bf16, why_unavailable
from server.model.cpu.linear import NativeLinear


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear`, whose own copy of the weight is let go."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out_features, in_features]`, unpacked into a copy, bit for bit."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


def pack_linears(model: nn.Module) -> int:
    """Pack what can be packed of `model` in place; returns how many linears that were."""
    found = {name: packed(module) for name, module in model.named_modules() if _is_packable(module)}
    changed = {name: module for name, module in found.items() if type(module) is not nn.Linear}
    for name, linear in changed.items():
        model.set_submodule(name, linear)
    return len(changed)


def packed(linear: nn.Module) -> nn.Module:
    """What computes in the place of `linear`: another module for a plain bf16 linear on a CPU, otherwise itself."""
    if not _is_packable(linear):
        return linear
    onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not why_unavailable(torch.bfloat16) and (multiplies_bf16() or not onednn):
        return NativeLinear(linear)
    return PackedLinear(linear) if onednn else linear


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Not for subclasses: a quantised linear stores something else."""
    return type(module) is nn.Linear and module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu"

"""bf16 linears on a CPU with their weights in the layout that oneDNN computes in.

`nn.Linear` reorders its weight anew on every call. Doing it once gives the same product in about two thirds of the time
at decode (measured in docs/decisions.md).
"""

import torch
from torch import nn


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
    """Pack every plain bf16 linear of `model` in place, where the processor has bf16 arithmetic; returns how many."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    linears = {name: module for name, module in model.named_modules() if _is_packable(module)}
    for name, linear in linears.items():
        model.set_submodule(name, PackedLinear(linear))
    return len(linears)


def _is_packable(module: nn.Module) -> bool:
    """Not for subclasses: a quantised linear stores something else."""
    return type(module) is nn.Linear and module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu"

"""bf16 linears in C++ (linear.h), with weights stored in the kernel's layout."""

import torch
from torch import nn

from server.model.cpu.library import function

_TILE = 32  # inputs and outputs are padded to a multiple of this (linear.h)


class NativeLinear(nn.Module):
    """Replaces a bf16 `nn.Linear` and does not keep its weight tensor. Sums are fp32, rounded once, in an order that
    does not depend on the batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach().contiguous()
        self.packed = torch.zeros(_padded(self.out_features) * _padded(self.in_features), dtype=torch.bfloat16)
        self._move(weight, unpack=False)
        self._linear = function("linear", torch.bfloat16)

    @property
    def weight(self) -> torch.Tensor:
        """An exact, unpacked copy of the weight `[out_features, in_features]`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16)
        self._move(weight, unpack=True)
        return weight

    def _move(self, weight: torch.Tensor, *, unpack: bool) -> None:
        pack = function("pack", torch.bfloat16)
        pack(self.packed.data_ptr(), weight.data_ptr(), self.out_features, self.in_features, unpack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)
        self._linear(
            y.data_ptr(), self.out_features, rows.data_ptr(), rows.stride(0), self.packed.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(), rows.shape[0], self.in_features, self.out_features,
            torch.get_num_threads(),
        )  # fmt: skip
        return y


def _padded(size: int) -> int:
    return -(-size // _TILE) * _TILE

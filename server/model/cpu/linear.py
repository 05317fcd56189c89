"""bf16 linears in C++ (linear.h), with their weights in the layout that they are computed in."""

import torch
from torch import nn

from server.model.cpu.library import function

_TILE = 32  # to a multiple of which inputs and outputs are padded (linear.h)


class NativeLinear(nn.Module):
    """Takes the place of an `nn.Linear` in bf16, whose own copy of the weight is let go. Sums are fp32, in one order
    whatever the batch, and rounded once."""

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
        """The weight `[out_features, in_features]`, unpacked into a copy, bit for bit."""
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

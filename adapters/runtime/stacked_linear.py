"""Sibling linears (query, key and value; gate and up) computed as one: one matrix, one product.

Each sibling remains visible as a module of its own, with its own weight and bias, for code that looks it up by name.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

Finish = Callable[[nn.Linear], nn.Module]  # turns a plain linear into the module that the device computes with


class StackedLinear(nn.Module):
    """`x [..., in]` to the outputs of all siblings side by side, `[..., sum of sizes]`; `inner` computes the
    product."""

    def __init__(self, inner: nn.Module, sizes: Sequence[int], biased: Sequence[bool]) -> None:
        super().__init__()
        self.inner = inner
        spans = pairwise(accumulate(sizes, initial=0))
        self.members = tuple(StackMember(self, *span, bias) for span, bias in zip(spans, biased, strict=True))

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.inner.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class StackMember(nn.Module):
    """One of the siblings as a module of its own: rows `[lo, hi)` of the stack."""

    def __init__(self, stack: StackedLinear, lo: int, hi: int, biased: bool) -> None:
        super().__init__()
        self._stack = (stack,)  # in a tuple, so that torch does not register the stack's parameters here
        self._rows = slice(lo, hi)
        self._biased = biased
        self.in_features, self.out_features = int(stack.inner.in_features), hi - lo  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._stack[0].weight
        return weight[self._rows]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._stack[0].inner.bias  # type: ignore[assignment]
        return None if bias is None or not self._biased else bias[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._stack[0](x)
        return y[..., self._rows]


def is_stackable(linears: Sequence[nn.Module]) -> bool:
    """Return True for two or more plain linears of one dtype; quantised and transposed linears have another layout."""
    plain = all(type(linear) is nn.Linear for linear in linears)
    return plain and len(linears) > 1 and len({linear.weight.dtype for linear in linears}) == 1


def stack(linears: Sequence[nn.Linear], finish: Finish) -> StackedLinear:
    """Return one module for `linears`, which are not modified; a bias that one of them lacks is zero."""
    biased = [linear.bias is not None for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=any(biased), device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if any(biased):
        biases = [weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
        whole.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return StackedLinear(finish(whole.eval()), [linear.out_features for linear in linears], biased)

"""LoRA on a two-dimensional parameter that a module computes with directly, such as the weight of a router."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from adapters.weights import LoraFactors


def is_low_rank(base: nn.Module, factors: Mapping[str, LoraFactors]) -> bool:
    """Return True if all these parameters of `base` are matrices, and `base` multiplies by them. An embedding's are
    looked up."""
    return not isinstance(base, nn.Embedding) and all(getattr(base, name).dim() == 2 for name in factors)


class _Shared:
    """A module that copies of its holder share, and that is none of the holder's own modules."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, _: Any) -> "_Shared":
        return self


class LowRankParameters(nn.Module):
    """Override: the base module's output with `W + B A` in the place of its parameters, of which only A and B take
    memory. The scaling is folded into B."""

    def __init__(self, base: nn.Module, factors: Mapping[str, LoraFactors], dtype: torch.dtype) -> None:
        super().__init__()
        self._names = tuple(factors)
        self._base = _Shared(base)
        for name, own in factors.items():
            self.register_buffer(f"{name}_a", own.a.to(dtype))
            self.register_buffer(f"{name}_b", (own.b.float() * own.scaling).to(dtype))

    def forward(self, _: Any, *inputs: Tensor) -> Any:
        base = self._base.module
        clone = copy.copy(base)
        clone._parameters = {name: own for name, own in base._parameters.items() if name not in self._names}
        vars(clone).pop("forward", None)
        for name in self._names:
            a, b = self._buffers[f"{name}_a"], self._buffers[f"{name}_b"]
            vars(clone)[name] = LowRankWeight(getattr(base, name), a, b)
        return clone.forward(*inputs)


class LowRankWeight:
    """`weight + b a` as torch's functions take it: `linear` multiplies by the factors, everything else by the sum."""

    def __init__(self, weight: Tensor, a: Any, b: Any) -> None:
        self._parts = (weight, a, b)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is linear and len(args) > 1 and isinstance(args[1], cls):
            weight, a, b = args[1]._parts
            return linear(args[0], weight, *args[2:], **given) + linear(linear(args[0], a), b)
        return func(*map(_dense, args), **{key: _dense(value) for key, value in given.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(_dense(self), name)


def _dense(value: Any) -> Any:
    if not isinstance(value, LowRankWeight):
        return value
    weight, a, b = value._parts
    return (weight.float() + b.float() @ a.float()).to(weight.dtype)

"""LoRA on stacked experts, gathered: each row's pairs of token and expert take the factors of the row's own adapter.

The base's product of an expert is computed once for all rows of the step. The deltas of an adapter are added for its
rows, segmented by expert, before the activation and after the down projection, so that an adapter takes no more memory
than its factors. The layout of the experts is what transformers' `use_experts_implementation` declares of a class.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from adapters.kernels.segments import SlotRows
from adapters.weights import LoraFactors

_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate", "num_experts")
_PROJECTIONS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_ALIGNMENT = 16  # bytes; the grouped product of a GPU takes no other strides


def is_gathered(module: nn.Module, parameters: Iterable[str] = ()) -> bool:
    """Return True for stacked experts that `experts_forward` can compute with factors of these parameters."""
    declared = all(hasattr(module, name) for name in _DECLARED) and not getattr(module, "_is_expert_parallel", False)
    return declared and _PROJECTIONS.issuperset(parameters)


class ExpertFactors(nn.Module):
    """An adapter's factors of one module's experts by parameter: A `[experts, r, in]`, B `[experts, out, r]`, with the
    scaling folded into B and r padded for the grouped product.

    As an override it changes nothing, because `GatheredExperts` has added the deltas within the module's forward.
    """

    def __init__(self, experts: int, factors: Mapping[str, LoraFactors], dtype: torch.dtype) -> None:
        super().__init__()
        for name, own in factors.items():
            a = own.a.float().reshape(experts, -1, own.a.shape[1])
            b = own.b.float().reshape(own.b.shape[0], -1, experts).permute(2, 0, 1) * own.scaling  # PEFT's layout
            missing = -a.shape[1] % (_ALIGNMENT // dtype.itemsize)
            self.register_buffer(f"{name}_a", nn.functional.pad(a, (0, 0, 0, missing)).to(dtype).contiguous())
            self.register_buffer(f"{name}_b", nn.functional.pad(b, (0, missing)).to(dtype).contiguous())

    def pair(self, parameter: str) -> tuple[Tensor, Tensor] | None:
        """Return A and B of one parameter; None where it has no factors."""
        buffers = self._buffers
        a, b = buffers.get(f"{parameter}_a"), buffers.get(f"{parameter}_b")
        return None if a is None or b is None else (a, b)

    def forward(self, y: Any, *_: Any) -> Any:
        return y


Owned = Iterable[tuple[SlotRows, ExpertFactors]]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of a token and an expert, by expert: `order` are their places in the flattened routing, `ends[e]` is the
    end of expert e's pairs."""

    order: Tensor
    experts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> "_Pairs":
        experts, order = torch.sort(index.reshape(-1), stable=True)
        return cls(order, experts, _ends(experts, num_experts))

    def of_rows(self, places: Tensor, rows: SlotRows, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return the places of the pairs of `rows` among all pairs, by expert, and the ends of the experts among them;
        `places` is the inverse of `order`."""
        own = places[rows.start * top_k : rows.end * top_k].sort().values
        return own, _ends(self.experts[own], num_experts)


def _ends(experts: Tensor, num_experts: int) -> Tensor:
    every = torch.arange(num_experts, device=experts.device)
    return torch.searchsorted(experts, every, right=True).to(torch.int32)


def experts_forward(module: Any, x: Tensor, index: Tensor, weights: Tensor, owned: Owned) -> Tensor:
    """Return the output of the experts `module` for `x [rows, hidden]`, routed by `index` and `weights` `[rows, k]`, as
    transformers' grouped implementation computes it, with the factors of the rows that are `owned`."""
    top_k, num_experts = index.shape[-1], module.num_experts
    pairs = _Pairs.of(index, num_experts)
    places = torch.empty_like(pairs.order)
    places[pairs.order] = torch.arange(len(pairs.order), device=x.device)
    own = [(pairs.of_rows(places, rows, top_k, num_experts), factors) for rows, factors in owned]

    def product(parameter: str, given: Tensor) -> Tensor:
        bias = getattr(module, f"{parameter}_bias")[pairs.experts] if module.has_bias else None
        y: Tensor = _grouped_linear(given, getattr(module, parameter), pairs.ends, bias, module.is_transposed)
        for (chosen, ends), factors in own:
            if (pair := factors.pair(parameter)) is not None:
                a, b = pair
                y.index_add_(0, chosen, _grouped_linear(_grouped_linear(given[chosen], a, ends), b, ends))
        return y

    up = product("gate_up_proj" if module.has_gate else "up_proj", x[pairs.order // top_k])
    down = product("down_proj", module._apply_gate(up) if module.has_gate else module.act_fn(up))
    if module.has_post_expert_norm:
        down = module.post_expert_norm(down)
    weighted = (down * weights.reshape(-1)[pairs.order, None])[places]
    found: Tensor = weighted.view(len(x), top_k, -1).sum(dim=1).to(x.dtype)
    return found


class GatheredExperts:
    """The forward of one experts module: the module's own, unless `owners` returns adapters of the step that have
    factors of it."""

    def __init__(self, module: nn.Module, owners: Callable[[], list[tuple[SlotRows, ExpertFactors]]]) -> None:
        self._module, self._owners = module, owners
        self._own: Callable[..., Tensor] = module.forward
        module.forward = self.forward

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        owned = self._owners()
        if not owned:
            return self._own(hidden_states, top_k_index, top_k_weights)
        return experts_forward(self._module, hidden_states, top_k_index, top_k_weights, owned)

"""Module overrides: an adapter's changes beyond A and B on linears, such as whole parameters, rows of tokens,
embeddings.

An override is a module. It takes the rows of the base module's output that belong to its adapter, and the same rows of
the base module's inputs, and returns the new output for these rows. It runs after the base, whose other rows are
bit-identical.
"""

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from adapters.kernels.segments import SlotRows
from adapters.runtime.experts import ExpertFactors

Output = Tensor | tuple[Tensor, ...]


class Replaced(nn.Module):
    """A module with the adapter's own parameters, whose output replaces the base's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, _: Output, *inputs: Tensor) -> Output:
        found: Output = self.module(*inputs)
        return found


class LowRank(nn.Module):
    """`y + (x aᵀ) bᵀ` for a head whose size differs from the base's: `a [r, in]`, `b [out, r]` with the scaling
    folded in."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + linear(linear(x, self.a), self.b)


class EmbeddingDelta(nn.Module):
    """`g ⊙ y + a[ids] b` for an input embedding: `a [vocab, r]`, `b [r, hidden]` with scaling and g folded in; g is
    DoRA's scale `[hidden]`, or None for 1. `scale` is the factor by which the base multiplies its rows (Gemma), or
    None."""

    a: Tensor
    b: Tensor
    g: Tensor | None
    scale: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, g: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        for name, tensor in (("a", a), ("b", b), ("g", g), ("scale", scale)):
            self.register_buffer(name, tensor)

    def forward(self, y: Tensor, ids: Tensor) -> Tensor:
        delta = self.a[ids] @ self.b
        if self.scale is not None:
            delta = delta * self.scale
        return (y if self.g is None else (self.g * y).to(y.dtype)) + delta


class TokenEmbedding(nn.Module):
    """The adapter's own rows of an input embedding: `values [n, hidden]` for the tokens `ids [n]`."""

    ids: Tensor
    values: Tensor

    def __init__(self, ids: Tensor, values: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.register_buffer("values", values if scale is None else values * scale)

    def forward(self, y: Tensor, ids: Tensor) -> Tensor:
        hits = ids[..., None] == self.ids
        own = self.values[hits.int().argmax(-1)]
        return torch.where(hits.any(-1, keepdim=True), own, y)


class TokenLogits(nn.Module):
    """The adapter's own rows of the output head: the logits of the tokens `ids [n]` come from `values [n, hidden]`."""

    ids: Tensor
    values: Tensor

    def __init__(self, ids: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.register_buffer("values", values)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y.index_copy(-1, self.ids, linear(x, self.values))


def replaced(base: nn.Module, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Replaced:
    """Return `base` with these parameters instead of its own; everything else is shared with `base`."""
    own = {name: nn.Parameter(tensor.to(dtype), requires_grad=False) for name, tensor in parameters.items()}
    if hasattr(base, "in_features") and "weight" in own:  # a plain linear, even for a quantised or transposed base
        return Replaced(_linear(own["weight"], own.get("bias", getattr(base, "bias", None))))
    clone = copy.copy(base)
    clone._parameters = {**base._parameters, **own}
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()  # the base's hooks apply overrides
    vars(clone).pop("forward", None)  # an instance's own forward would read the base's parameters
    return Replaced(clone)


def _linear(weight: nn.Parameter, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def nbytes(module_overrides: Iterable[nn.Module]) -> int:
    """Return the size of the adapter's tensors in bytes; parameters shared with the base count too."""
    return sum(t.nbytes for t in _tensors(module_overrides))


def _tensors(module_overrides: Iterable[nn.Module]) -> list[Tensor]:
    """Return every tensor of the overrides once."""
    found = {id(t): t for override in module_overrides for t in (*override.parameters(), *override.buffers())}
    return [*found.values()]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


@dataclass(frozen=True, slots=True)
class ModuleOverridePlan:
    """The adapters of a step that have overrides: their rows, and their overrides by module. `num_rows` is the
    number of rows of the step."""

    owners: tuple[tuple[SlotRows, Mapping[str, tuple[nn.Module, ...]]], ...]
    num_rows: int

    def touches(self, name: str) -> bool:
        """Return True if any of the adapters overrides module `name`."""
        return any(name in own for _, own in self.owners)

    def apply(self, name: str, inputs: tuple[Any, ...], output: Output) -> Output:
        """Return the output of module `name` with the owners' rows replaced by the results of their overrides."""
        for rows, module_overrides in self.owners:
            if name in module_overrides and not isinstance(module_overrides[name][0], ExpertFactors):
                own = self._rows(output, rows)
                given = [self._rows(x, rows) for x in inputs]
                for override in module_overrides[name]:
                    own = override(own, *given)
                output = self._put(output, rows, own)
        return output

    def expert_factors(self, name: str) -> list[tuple[SlotRows, ExpertFactors]]:
        """Return the owners that have factors of the experts `name`; their rows are complete after its forward."""
        stacks = [(rows, own.get(name, ())) for rows, own in self.owners]
        return [(rows, stack[0]) for rows, stack in stacks if stack and isinstance(stack[0], ExpertFactors)]

    def _rows(self, x: Any, rows: SlotRows) -> Any:
        if isinstance(x, tuple):
            return tuple(self._rows(part, rows) for part in x)
        return x[:, rows.start : rows.end] if self._is_batched(x) else x[rows.start : rows.end]

    def _put(self, output: Any, rows: SlotRows, own: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._put(part, rows, part_own) for part, part_own in zip(output, own, strict=True))
        if own.shape[-1] > output.shape[-1]:  # a larger vocabulary
            output = pad(output, (0, own.shape[-1] - output.shape[-1]))
        target = self._rows(output, rows)
        target[..., : own.shape[-1]] = own
        target[..., own.shape[-1] :] = 0
        return output

    def _is_batched(self, x: Tensor) -> bool:
        """Return True for a tensor `[1, rows, …]`, False for `[rows, …]`: modules see a step in either shape."""
        return x.shape[:2] == (1, self.num_rows)


class ModuleOverrideTable:
    """Overrides by slot. Writes go to slots that no running sequence refers to, so they may happen in another
    thread. `written` has the names of overridden modules in the order of the writes, for hooks.py to take."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, Mapping[str, tuple[nn.Module, ...]]] = {}
        self.written: deque[str] = deque()

    def __contains__(self, slot: int) -> bool:
        """Return True if the slot's adapter has overrides."""
        return slot in self._by_slot

    def write(self, slot: int, module_overrides: Mapping[str, tuple[nn.Module, ...]]) -> None:
        if module_overrides:
            self._by_slot[slot] = {name: tuple(map(self._on_device, own)) for name, own in module_overrides.items()}
            self.written.extend(module_overrides)
        else:
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Release the overrides of `slot`."""
        self._by_slot.pop(slot, None)

    def tensors(self, slot: int) -> list[Tensor]:
        """Return the tensors that `slot` holds on the device; parameters shared with the base are among them."""
        return _tensors(override for own in self._by_slot.get(slot, {}).values() for override in own)

    def slots(self) -> set[int]:
        """Return the slots that hold overrides."""
        return set(self._by_slot)

    def _on_device(self, override: nn.Module) -> nn.Module:
        """Return the override on the device. The host's copy stays in host memory, and what is on the device already,
        such as parameters shared with the base, is shared and not copied."""
        if self._device.type == "cpu":
            return override
        return copy.deepcopy(override, {id(t): _moved(t, self._device) for t in _tensors([override])})

    def plan_rows(self, rows: Iterable[SlotRows], num_rows: int) -> ModuleOverridePlan | None:
        """Return the plan of a step's rows; None when no adapter of the step has overrides."""
        owners = tuple((r, self._by_slot[r.slot]) for r in rows if r.slot in self._by_slot)
        return ModuleOverridePlan(owners, num_rows) if owners else None

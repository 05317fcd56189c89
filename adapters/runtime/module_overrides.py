"""What an adapter does to a module beyond A and B on linears: parameters of its own, rows of tokens, embeddings.

An overlay takes the rows of the module's output that belong to its adapter, and the same rows of the module's inputs,
and returns what these rows should be. It runs after the base, whose other rows keep their bits.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from adapters.kernels.segments import SlotRows

Output = Tensor | tuple[Tensor, ...]


class Replaced(nn.Module):
    """The module with parameters of the adapter's own, in place of the base's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, _: Output, *inputs: Tensor) -> Output:
        found: Output = self.module(*inputs)
        return found


class LowRank(nn.Module):
    """`y + (x aᵀ) bᵀ` for a head whose size is not the base's, `a [r, in]`, `b [out, r]` with the scaling inside."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + linear(linear(x, self.a), self.b)


class EmbeddingDelta(nn.Module):
    """`g ⊙ y + a[ids] b` for an input embedding, `a [vocab, r]`, `b [r, hidden]` with scaling and g inside; g is DoRA's
    scale `[hidden]` or 1. `scale` is what the base multiplies its rows with (Gemma)."""

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
    """Rows of an input embedding that are the adapter's own: `values [n, hidden]` for the tokens `ids [n]`."""

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
    """The same rows in the output head: logits of the tokens `ids [n]` come from `values [n, hidden]`."""

    ids: Tensor
    values: Tensor

    def __init__(self, ids: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.register_buffer("values", values)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y.index_copy(-1, self.ids, linear(x, self.values))


def replaced(base: nn.Module, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Replaced:
    """`base` with these parameters in place of its own; it shares everything else with it."""
    own = {name: nn.Parameter(tensor.to(dtype), requires_grad=False) for name, tensor in parameters.items()}
    if hasattr(base, "in_features") and "weight" in own:  # a linear, whichever way the base's is stored
        return Replaced(_linear(own["weight"], own.get("bias", getattr(base, "bias", None))))
    clone = copy.copy(base)
    clone._parameters = {**base._parameters, **own}
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()  # the base's call overlays
    vars(clone).pop("forward", None)  # one that was put in the class's place reads the base's own parameters
    return Replaced(clone)


def _linear(weight: nn.Parameter, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def nbytes(overlays: Iterable[nn.Module]) -> int:
    """Of what belongs to the adapter, in bytes; parameters shared with the base count too."""
    tensors = {id(t): t for overlay in overlays for t in (*overlay.parameters(), *overlay.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass(frozen=True, slots=True)
class OverlayPlan:
    """The adapters of a step that have overlays: whose rows, and by module which. `num_rows` are those of the step."""

    owners: tuple[tuple[SlotRows, Mapping[str, tuple[nn.Module, ...]]], ...]
    num_rows: int

    def apply(self, name: str, inputs: tuple[Any, ...], output: Output) -> Output:
        """The output of module `name` with the owners' rows as their overlays have them."""
        for rows, overlays in self.owners:
            if name in overlays:
                own = self._rows(output, rows)
                given = [self._rows(x, rows) for x in inputs]
                for overlay in overlays[name]:
                    own = overlay(own, *given)
                output = self._put(output, rows, own)
        return output

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
        """Modules see the step as `[1, rows, …]` or as `[rows, …]`."""
        return x.shape[:2] == (1, self.num_rows)


class OverlayTable:
    """Overlays by slot. Writing goes to slots that no running sequence refers to, so it may happen in another thread;
    hooks are installed between two steps, for modules that have overlays, and stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, Mapping[str, tuple[nn.Module, ...]]] = {}
        self._hooked: set[str] = set()

    def write(self, slot: int, overlays: Mapping[str, tuple[nn.Module, ...]]) -> None:
        if overlays:
            self._by_slot[slot] = {name: tuple(map(self._on_device, own)) for name, own in overlays.items()}
        else:
            self._by_slot.pop(slot, None)

    def _on_device(self, overlay: nn.Module) -> nn.Module:
        """What is in host memory stays there: a module moves in place."""
        return overlay if self._device.type == "cpu" else copy.deepcopy(overlay).to(self._device)

    def plan(self, rows: Iterable[SlotRows], num_rows: int) -> OverlayPlan | None:
        """None when no adapter of the step has overlays."""
        owners = tuple((r, self._by_slot[r.slot]) for r in rows if r.slot in self._by_slot)
        return OverlayPlan(owners, num_rows) if owners else None

    def hook(self, plan: OverlayPlan, install: Callable[[str], None]) -> None:
        """Install the hooks that `plan` needs and that are not there yet."""
        for _, overlays in plan.owners:
            for name in overlays.keys() - self._hooked:
                install(name)
                self._hooked.add(name)

"""Adapters' entry points into the model's linears: every adaptable linear is wrapped once at start."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from adapters.model_spec import ModelSpec
from adapters.runtime.pool import AdapterPool
from adapters.runtime.stacked_linear import Finish, StackedLinear, is_stackable, stack
from adapters.runtime.step import Current, StepPlan


class LoRAGroup(nn.Module):
    """Linears over one input: usually a single one, or a stack of siblings. The forward scales or maps the input for
    the base, runs the base, applies scale and shift and row maps to its output, and adds the adapters' segmented delta.

    The base runs on all rows with its own weights and kernel, so base rows are bit-identical to those of a model
    without adapters. `base` is the current module: the model's own, or that of a merged adapter. `columns` are the
    group's buffers in the pool, `current` has the plan of the step in progress.
    """

    def __init__(self, names: Sequence[str], base: nn.Module, pool: AdapterPool, current: Current) -> None:
        super().__init__()
        self.base = base
        self.names = tuple(names)
        self.columns = pool.stacked(self.names)
        self.spans = list(pairwise(accumulate(self.columns.sizes, initial=0)))
        self.kernel = pool.kernel
        self.scale_shift = pool.scale_shift
        self.input_scale_shift = pool.input_scale_shift
        self.current = current
        self.state = pool.state
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None  # an input, and all siblings' outputs for it
        self._taken: set[int] = set()

    @property
    def in_features(self) -> int:
        return self.columns.a.shape[2]

    def member(self, index: int) -> nn.Module:
        """Return the base's own module of one linear."""
        return self.base.members[index] if isinstance(self.base, StackedLinear) else self.base

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return one linear's output. The first sibling called for an input computes the outputs of all; each
        sibling takes its part once."""
        if len(self.names) == 1:
            return self.forward(x)
        if self._shared is None or self._shared[0] is not x or index in self._taken:
            self._shared, self._taken = (x, self.forward(x)), set()
        y = self._shared[1]
        self._taken.add(index)
        if len(self._taken) == len(self.names):
            self._shared = None
        lo, hi = self.spans[index]
        return y[..., lo:hi]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all linears side by side, `[..., sum of sizes]`, for `x [..., in_features]`."""
        plan = self.current.plan
        y = self._mapped_output(x, plan)
        if plan.active:
            rows, sizes = y.view(-1, y.shape[-1]), self.columns.sizes
            if len(sizes) == 1 and rows.shape[1] > sizes[0]:  # another row's adapter has a larger vocabulary
                rows = rows[:, : sizes[0]]
            if plan.scale_shift is not None:
                for name, (lo, hi) in zip(self.names, self.spans, strict=True):
                    self.scale_shift.apply(rows[:, lo:hi], name, plan.scale_shift)
            if plan.row_maps is not None:
                for name, (lo, hi) in zip(self.names, self.spans, strict=True):
                    plan.row_maps.apply(rows[:, lo:hi], x.reshape(-1, x.shape[-1]), name)
            if plan.touches(self.names):
                self.kernel.add_lora(rows, x.reshape(-1, x.shape[-1]), *self.columns, plan.kernel_plan)
        return y

    def replace_base(self, module: nn.Module) -> None:
        """Compute with another base module, or one whose parameters were replaced, from the next step on."""
        self.base = module
        self.state.replaced_base()

    def _mapped_output(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Return the base's output for an input whose rows may have maps before the base. In a stack, every sibling has
        a map of its own: mapped rows are computed as further rows, so that the base still runs once."""
        rows = x.reshape(-1, x.shape[-1])
        mapped = [] if plan.row_maps is None else plan.row_maps.inputs(rows, self.names)
        if not mapped:
            return self._base_output(x, plan)
        if len(self.names) == 1:
            rows = rows.clone()
            for _, place, own in mapped:
                rows[place.start : place.end] = own
            return self._base_output(rows.view_as(x), plan)
        y = self._base_output(torch.cat([rows, *(own for _, _, own in mapped)]), plan)
        found, *others = torch.split(y, [len(rows), *(len(own) for _, _, own in mapped)])
        for (index, place, _), own in zip(mapped, others, strict=True):
            lo, hi = self.spans[index]
            found[place.start : place.end, lo:hi] = own[:, lo:hi]
        return found.view(*x.shape[:-1], -1)

    def _base_output(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        scales = plan.input_scale_shift
        members = self.base.members if isinstance(self.base, StackedLinear) else (self.base,)
        apart = len(members) > 1 and any(member._forward_hooks for member in members)
        inputs = [x] * len(members)
        if scales is not None:
            inputs = [self.input_scale_shift.applied(x, name, scales) for name in self.names]
            apart = apart or any(own is not inputs[0] for own in inputs)
        if apart:
            return torch.cat([member(own) for member, own in zip(members, inputs, strict=True)], -1)
        y: torch.Tensor = self.base(inputs[0])
        return y


class LoRALinear(nn.Module):
    """One adaptable linear of the model, a part of its group."""

    def __init__(self, group: LoRAGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self._index = index

    @property
    def base(self) -> nn.Module:
        return self.group.member(self._index)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; models read it for the dtype and for tying."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.part(self._index, x)


def attach(
    model: nn.Module, spec: ModelSpec, pool: AdapterPool, head: str | None, finish: Finish
) -> dict[str, nn.Module]:
    """Wrap every linear of `spec` in place, with siblings stacked where possible. `finish` turns a plain linear into
    the module that the device computes with. `head` is the name of the output head, which sees only sampled rows.

    Returns the base's own modules by name: the wrapped linears, and every other module that adapters may change.
    """
    bases = {name: model.get_submodule(name) for name in spec.parameters.keys() - spec.modules.keys()}
    for names in spec.groups():
        current = pool.state.head if names[0] == head else pool.state.tokens
        for group in _groups(model, names, pool, current, finish):
            for index, name in enumerate(group.names):
                model.set_submodule(name, LoRALinear(group, index))
                bases[name] = group.member(index)
    return bases


def _groups(
    model: nn.Module, names: tuple[str, ...], pool: AdapterPool, current: Current, finish: Finish
) -> list[LoRAGroup]:
    """Return one group of all `names` if their linears can be stacked, or one group for each."""
    linears: list[Any] = [model.get_submodule(name) for name in names]
    if is_stackable(linears):
        return [LoRAGroup(names, stack(linears, finish), pool, current)]
    return [LoRAGroup((name,), finish(linear), pool, current) for name, linear in zip(names, linears, strict=True)]


def wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the wrapped linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

"""Adapters' entry points into the model: every adaptable linear is wrapped once at start, and hooks apply module
overrides."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from adapters.model_spec import ModelSpec
from adapters.runtime.module_overrides import Output
from adapters.runtime.pool import AdapterPool, StepPlan
from adapters.runtime.stacked_linear import Finish, StackedLinear, is_stackable, stack


class LoRAGroup(nn.Module):
    """Linears over one input: usually a single one, or a stack of siblings. The forward scales the input for the base,
    runs the base, applies scale and shift to its output, and adds the adapters' segmented delta.

    The base runs on all rows with its own weights and kernel, so base rows are bit-identical to those of a model
    without adapters. `base` is the current module: the model's own, or that of a merged adapter. `columns` are the
    group's buffers in the pool, `plan` describes the step's adapters.
    """

    def __init__(self, names: Sequence[str], base: nn.Module, pool: AdapterPool, plan: StepPlan) -> None:
        super().__init__()
        self.base = base
        self.names = tuple(names)
        self.columns = pool.stacked(self.names)
        self._spans = list(pairwise(accumulate(self.columns.sizes, initial=0)))
        self.kernel = pool.kernel
        self._scale_shift = pool.scale_shift
        self._input_scale_shift = pool.input_scale_shift
        self.plan = plan
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
        lo, hi = self._spans[index]
        return y[..., lo:hi]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all linears side by side, `[..., sum of sizes]`, for `x [..., in_features]`."""
        y = self._base_output(x)
        if self.plan.active:
            rows, sizes = y.view(-1, y.shape[-1]), self.columns.sizes
            if len(sizes) == 1 and rows.shape[1] > sizes[0]:  # another row's adapter has a larger vocabulary
                rows = rows[:, : sizes[0]]
            if self.plan.scale_shift is not None:
                for name, (lo, hi) in zip(self.names, self._spans, strict=True):
                    self._scale_shift.apply(rows[:, lo:hi], name, self.plan.scale_shift)
            if self.plan.touches(self.names):
                self.kernel.add_lora(rows, x.reshape(-1, x.shape[-1]), *self.columns, self.plan.kernel_plan)
        return y

    def _base_output(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.plan.input_scale_shift
        members = self.base.members if isinstance(self.base, StackedLinear) else (self.base,)
        apart = len(members) > 1 and any(member._forward_hooks for member in members)
        inputs = [x] * len(members)
        if scales is not None:
            inputs = [self._input_scale_shift.applied(x, name, scales) for name in self.names]
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


class ModuleOverrideHook:
    """Forward hook that applies the step's overrides of one module.

    An adapter's own tokens may be beyond the base's embedding: the base looks up its last row for them, which the
    override replaces.
    """

    def __init__(self, name: str, module: nn.Module, plan: StepPlan) -> None:
        self._name = name
        self._plan = plan
        self._inputs: tuple[Any, ...] | None = None
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Embedding, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        self._inputs = inputs
        if self._plan.module_overrides is None:
            return None
        return (inputs[0].clamp(max=module.num_embeddings - 1), *inputs[1:])

    def _after(self, _: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output | None:
        if self._plan.module_overrides is None:
            return None
        return self._plan.module_overrides.apply(self._name, self._inputs or inputs, output)


def attach(
    model: nn.Module, spec: ModelSpec, pool: AdapterPool, head: str | None, finish: Finish
) -> dict[str, nn.Module]:
    """Wrap every linear of `spec` in place, with siblings stacked where possible. `finish` turns a plain linear into
    the module that the device computes with. `head` is the name of the output head, which sees only sampled rows.

    Returns the base's own modules by name: the wrapped linears, and every other module that adapters may change.
    """

    def plan_of(name: str) -> StepPlan:
        return pool.head_plan if name == head else pool.token_plan

    bases = {name: model.get_submodule(name) for name in spec.parameters.keys() - spec.modules.keys()}
    for names in spec.groups():
        for group in _groups(model, names, pool, plan_of(names[0]), finish):
            for index, name in enumerate(group.names):
                model.set_submodule(name, LoRALinear(group, index))
                bases[name] = group.member(index)

    def install_hook(name: str) -> None:
        ModuleOverrideHook(name, bases[name], plan_of(name))

    pool.install_hook = install_hook
    return bases


def _groups(
    model: nn.Module, names: tuple[str, ...], pool: AdapterPool, plan: StepPlan, finish: Finish
) -> list[LoRAGroup]:
    """Return one group of all `names` if their linears can be stacked, or one group for each."""
    linears: list[Any] = [model.get_submodule(name) for name in names]
    if is_stackable(linears):
        return [LoRAGroup(names, stack(linears, finish), pool, plan)]
    return [LoRAGroup((name,), finish(linear), pool, plan) for name, linear in zip(names, linears, strict=True)]


def wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the wrapped linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

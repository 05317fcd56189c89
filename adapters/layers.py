"""The second seam into the model: every adaptable linear, wrapped once at start, and hooks on what else adapters
change."""

from typing import Any

import torch
from torch import nn

from adapters.overlays import Output
from adapters.pool import AdapterPool, StepPlan
from adapters.spec import ModelSpec


class LoRALinear(nn.Module):
    """The base linear (of what the step's adapters make of its input), then what they make of its output, then their
    segmented delta on top.

    The base runs on all rows with its own weights and kernel, so base rows keep the bits they would have had.
    """

    def __init__(self, base: nn.Module, pool: AdapterPool, name: str, plan: StepPlan) -> None:
        super().__init__()
        self.base = base
        self._a, self._b = pool.buffers[name]
        self._name = name
        self._kernel = pool.kernel
        self._affine = pool.affine
        self._input_affine = pool.input_affine
        self._plan = plan

    @property
    def weight(self) -> torch.Tensor:
        """Models look at their linears' weights (for the dtype, for tying)."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = self._plan.input_affine
        y: torch.Tensor = self.base(x if scales is None else self._input_affine.applied(x, self._name, scales))
        if self._plan.active:
            rows = y.view(-1, y.shape[-1])
            if rows.shape[1] > self._b.shape[1]:  # a neighbour's vocabulary is larger than the base's
                rows = rows[:, : self._b.shape[1]]
            if self._plan.affine is not None:
                self._affine.apply(rows, self._name, self._plan.affine)
            self._kernel.add_lora(rows, x.reshape(-1, x.shape[-1]), self._a, self._b, self._plan.plan)
        return y


class OverlayHook:
    """Lets the step's overlays of one module follow its forward.

    An adapter's own tokens may be beyond the base's embedding: the base looks up its last row for them, which the
    overlay replaces.
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
        if self._plan.overlays is None:
            return None
        return (inputs[0].clamp(max=module.num_embeddings - 1), *inputs[1:])

    def _after(self, _: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output | None:
        if self._plan.overlays is None:
            return None
        return self._plan.overlays.apply(self._name, self._inputs or inputs, output)


def attach(model: nn.Module, spec: ModelSpec, pool: AdapterPool, head: str | None) -> dict[str, nn.Module]:
    """Wrap every linear of `spec` in place; `head` names the output head, which sees only sampled rows.

    Returns the base's own modules, by name: those, and all that adapters may change otherwise.
    """
    bases = {name: model.get_submodule(name) for name in spec.modules.keys() | spec.parameters.keys()}

    def plan_of(name: str) -> StepPlan:
        return pool.head_plan if name == head else pool.token_plan

    for name in spec.modules:
        model.set_submodule(name, LoRALinear(bases[name], pool, name, plan_of(name)))

    def install_hook(name: str) -> None:
        OverlayHook(name, bases[name], plan_of(name))

    pool.install_hook = install_hook
    return bases


def wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped linears of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

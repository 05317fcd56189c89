"""The second seam into the model: every adaptable linear, wrapped once at start."""

import torch
from torch import nn

from adapters.pool import AdapterPool, StepPlan
from adapters.spec import ModelSpec


class LoRALinear(nn.Module):
    """The base linear, then what the step's adapters make of its output, then their segmented delta on top.

    The base runs on all rows with its own weights and kernel, so base rows keep the bits they would have had.
    """

    def __init__(self, base: nn.Module, pool: AdapterPool, name: str, plan: StepPlan) -> None:
        super().__init__()
        self.base = base
        self._a, self._b = pool.buffers[name]
        self._name = name
        self._kernel = pool.kernel
        self._affine = pool.affine
        self._plan = plan

    @property
    def weight(self) -> torch.Tensor:
        """Models look at their linears' weights (for the dtype, for tying)."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self._plan.active:
            rows = y.view(-1, y.shape[-1])
            if self._plan.affine is not None:
                self._affine.apply(rows, self._name, self._plan.affine)
            self._kernel.add_lora(rows, x.reshape(-1, x.shape[-1]), self._a, self._b, self._plan.plan)
        return y


def attach(model: nn.Module, spec: ModelSpec, pool: AdapterPool, head: str | None) -> dict[str, nn.Module]:
    """Wrap every module of `spec` in place; `head` names the output head, which sees only sampled rows.

    Returns the base's own modules.
    """
    bases = {name: model.get_submodule(name) for name in spec.modules}
    for name, base in bases.items():
        plan = pool.head_plan if name == head else pool.token_plan
        model.set_submodule(name, LoRALinear(base, pool, name, plan))
    return bases

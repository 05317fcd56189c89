"""Hooks on the base's own modules, which apply the module overrides of a step's adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapters.kernels.segments import SlotRows
from adapters.runtime.experts import ExpertFactors, GatheredExperts, is_gathered
from adapters.runtime.module_overrides import Output
from adapters.runtime.pool import AdapterPool
from adapters.runtime.step import Current


class ModuleOverrideHook:
    """Forward hook that applies the step's overrides of one module.

    An adapter's own tokens may be beyond the base's embedding: the base looks up its last row for them, which the
    override replaces.
    """

    def __init__(self, name: str, module: nn.Module, current: Current) -> None:
        self.name = name
        self._current = current
        self._inputs: tuple[Any, ...] | None = None
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(self._before)
        if is_gathered(module):
            GatheredExperts(module, self._expert_factors)
        module.register_forward_hook(self._after)

    def _expert_factors(self) -> list[tuple[SlotRows, ExpertFactors]]:
        overrides = self._current.plan.module_overrides
        return [] if overrides is None else overrides.expert_factors(self.name)

    def _before(self, module: nn.Embedding, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        self._inputs = inputs
        if self._current.plan.module_overrides is None:
            return None
        return (inputs[0].clamp(max=module.num_embeddings - 1), *inputs[1:])

    def _after(self, _: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output | None:
        overrides = self._current.plan.module_overrides
        if overrides is None:
            return None
        return overrides.apply(self.name, self._inputs or inputs, output)


class ModuleOverrideHooks:
    """The hooks of a model: one for each module that an adapter has overridden so far, never removed.

    `bases` are the base's own modules by name; `head` is the name of the output head.
    """

    def __init__(self, bases: Mapping[str, nn.Module], pool: AdapterPool, head: str | None) -> None:
        self._bases, self._head = bases, head
        self._state = pool.state
        self._written = pool.module_overrides.written
        self._hooked: set[str] = set()

    def install(self) -> None:
        """Install the hooks that adapters written since the last call need. Call it between two steps: an adapter is
        written before a sequence can use it."""
        while self._written:
            name = self._written.popleft()
            if name not in self._hooked:
                self._hooked.add(name)
                current = self._state.head if name == self._head else self._state.tokens
                ModuleOverrideHook(name, self._bases[name], current)

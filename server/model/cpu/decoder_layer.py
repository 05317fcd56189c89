"""A whole decoder layer of Llama's structure in one C++ call (decoder_layer.h), used where adapters
change its linears by A and B and by scale and shift alone.

By modules, a layer takes a hundred Python calls, which take as long as the arithmetic of a step with one row. Both ways
are bit-identical.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.cpu import NativeKernel
from adapters.runtime.hooks import ModuleOverrideHook
from adapters.runtime.stacked_linear import StackedLinear
from adapters.runtime.step import StepPlan
from server.model.batch import ForwardBatch
from server.model.cpu.attention import plan_attention
from server.model.cpu.layer_arguments import Layer, Step, layer_argument, step_argument
from server.model.cpu.layer_vectors import LayerVectors
from server.model.cpu.library import function
from server.model.kv_cache import KVCache
from server.model.llama_layer import LayerParts


class NativeLayer:
    """One layer of a bf16 model; `layer` contains all of `parts`."""

    def __init__(self, layer: nn.Module, parts: LayerParts) -> None:
        self._inner = [module for module in layer.modules() if module is not layer]
        self._parts = parts
        self._kernel = parts.groups[0].kernel
        self._current, self._state = parts.groups[0].current, parts.groups[0].state
        self._function = function("decoder_layer", torch.bfloat16)
        self._base_epoch = -1  # of what follows
        self._layer: Layer | None = None
        self._hooks: list[dict[int, Callable[..., Any]]] = []
        self._modules: frozenset[str] | None = None  # modules with A and B in `_layer`
        self._vectors = LayerVectors(parts.groups)

    def is_whole(self) -> bool:
        """Return whether this step can compute the layer in one call: every linear is native, adapters have only A and
        B, scale and shift here, and no hook is active in between."""
        if self._base_epoch != self._state.base_epoch:
            self._describe()
        plan = self._current.plan
        if self._layer is None or plan.row_maps is not None:
            return False
        return (not any(self._hooks) or self._hooks_are_idle(plan)) and self._vectors.choose(self._layer, plan)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        layer, plan = self._layer, self._current.plan
        assert layer is not None, "is_whole() must have returned True"
        keys, values = cache.keys[self._parts.index], cache.values[self._parts.index]
        if plan.active and plan.modules is not self._modules:
            self._choose_adapted(layer)
        hidden = hidden.contiguous()
        y = torch.empty_like(hidden)
        self._function(
            y.data_ptr(), hidden.data_ptr(), keys.data_ptr(), values.data_ptr(), ctypes.byref(layer),
            ctypes.byref(self._step(batch, cos, sin, cache.block_size)),
        )  # fmt: skip
        return y

    def _describe(self) -> None:
        """Describe the layer at first, and again after an adapter was merged or unmerged."""
        self._layer = layer_argument(self._parts) if isinstance(self._kernel, NativeKernel) else None
        self._hooks, self._modules = self._all_hooks(), None
        self._vectors = LayerVectors(self._parts.groups)
        self._base_epoch = self._state.base_epoch

    def _choose_adapted(self, layer: Layer) -> None:
        """Compute linears without adapters if no adapter of the step changes them."""
        plan = self._current.plan
        self._modules = plan.modules
        for linears, group in zip(layer.linears(), self._parts.groups, strict=True):
            linears.a = group.columns.a.data_ptr() if plan.touches(group.names) else None

    def _all_hooks(self) -> list[dict[int, Callable[..., Any]]]:
        bases = [group.base for group in self._parts.groups]
        members = [member for base in bases if isinstance(base, StackedLinear) for member in base.members]
        modules = [*self._inner, *bases, *members]
        return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def _hooks_are_idle(self, plan: StepPlan) -> bool:
        """Return whether all hooks are those of module overrides, which stay registered, of adapters that are not in
        this step."""
        hooks = (getattr(hook, "__self__", None) for hooks in self._hooks for hook in hooks.values())
        return all(isinstance(hook, ModuleOverrideHook) and not plan.overrides(hook.name) for hook in hooks)

    def _step(self, batch: ForwardBatch, cos: Tensor, sin: Tensor, block_size: int) -> Step:
        """Return the description of the step, created in the first layer and reused by the others."""
        own, plan = plan_attention(batch), self._current.plan
        if own.step is None or own.step[0] is not plan or own.step[1] is not cos:
            assert cos.shape == sin.shape == (1, len(batch.input_ids), self._parts.head_dim), "whole heads are rotated"
            assert cos.is_contiguous() and sin.is_contiguous() and isinstance(self._kernel, NativeKernel)
            lora = self._kernel.view_for_cpp(plan.kernel_plan)
            own.step = plan, cos, step_argument(batch, own, lora, cos, sin, block_size)
        step: Step = own.step[2]
        return step

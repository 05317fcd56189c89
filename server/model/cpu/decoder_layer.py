"""A whole decoder layer of Llama's structure in one C++ call (decoder_layer.h), used if only LoRA A and B change the
outputs of its linears.

By modules, a layer takes a hundred Python calls, which take as long as the arithmetic of a step with one row. Both ways
are bit-identical.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.cpu import NativeKernel
from adapters.kernels.cpu import NativePlan as LoRAPlan
from adapters.runtime.layers import LoRAGroup, ModuleOverrideHook
from adapters.runtime.stacked_linear import StackedLinear
from server.model.batch import ForwardBatch
from server.model.cpu import attention
from server.model.cpu.attention import NativePlan
from server.model.cpu.library import function
from server.model.cpu.linear import NativeLinear
from server.model.kv_cache import KVCache
from server.model.llama_layer import LayerParts

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linears(ctypes.Structure):
    _fields_ = [
        ("packed", _POINTER), ("bias", _POINTER), ("in_features", _SIZE), ("out_features", _SIZE), ("a", _POINTER),
        ("b", _POINTER), ("columns", _SIZE), ("siblings", _SIZE), ("sizes", _SIZE * 3),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", _Linears), ("o", _Linears), ("gate_up", _Linears), ("down", _Linears), ("attention_norm", _POINTER),
        ("mlp_norm", _POINTER), ("attention_eps", _FLOAT), ("mlp_eps", _FLOAT), ("scale", _FLOAT),
        ("kv_heads", _SIZE), ("head_dim", _SIZE), ("window", _SIZE),
    ]  # fmt: skip

    def linears(self) -> list[_Linears]:
        """Return the linears in the order of `LayerParts.groups`."""
        return [self.qkv, self.o, self.gate_up, self.down]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", _SIZE), ("cos", _POINTER), ("sin", _POINTER), ("slots", _POINTER), ("work", _POINTER),
        ("num_work", _SIZE), ("tables", _POINTER), ("block_size", _SIZE), ("lora", _POINTER * 3),
        ("segments", _POINTER), ("scales", _POINTER), ("num_segments", _SIZE), ("threads", ctypes.c_int),
    ]  # fmt: skip


class NativeLayer:
    """One layer of a bf16 model; `layer` contains all of `parts`."""

    def __init__(self, layer: nn.Module, parts: LayerParts) -> None:
        self._inner = [module for module in layer.modules() if module is not layer]
        self._parts = parts
        self._plan = parts.groups[0].plan
        self._function = function("decoder_layer", torch.bfloat16)
        self._bases: list[nn.Module | None] = []
        self._hooks: list[dict[int, Callable[..., Any]]] = []
        self._described: _Layer | None = None
        self._modules: frozenset[str] | None = None  # modules with A and B in `_described`

    def is_whole(self) -> bool:
        """Return whether this step can compute the layer in one call: every linear is native, adapters have only A and
        B, and no hook is active in between."""
        bases = [group._modules["base"] for group in self._parts.groups]
        if bases != self._bases:  # first call, or an adapter was merged or unmerged
            self._bases, self._described, self._hooks = bases, self._description(), self._all_hooks(bases)
            self._modules = None
        if self._described is None or not self._plan.is_lora_alone():
            return False
        return not any(self._hooks) or self._hooks_are_idle()

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        assert self._described is not None, "is_whole() must have returned True"
        keys, values = cache.keys[self._parts.index], cache.values[self._parts.index]
        if self._plan.active and self._plan.modules is not self._modules:
            self._choose_adapted(self._described)
        hidden = hidden.contiguous()
        y = torch.empty_like(hidden)
        self._function(
            y.data_ptr(), hidden.data_ptr(), keys.data_ptr(), values.data_ptr(), ctypes.byref(self._described),
            ctypes.byref(self._step(batch, cos, sin, cache.block_size)),
        )  # fmt: skip
        return y

    def _description(self) -> _Layer | None:
        parts = self._parts
        linears = [_linears(group) for group in parts.groups]
        if None in linears or not isinstance(parts.groups[0].kernel, NativeKernel):
            return None
        norms: Any = parts.norms
        weights, epsilons = [norm.weight.data_ptr() for norm in norms], [norm.variance_epsilon for norm in norms]
        kv_heads = parts.groups[0].columns.sizes[1] // parts.head_dim
        return _Layer(*linears, *weights, *epsilons, parts.scale, kv_heads, parts.head_dim, parts.window or 0)

    def _choose_adapted(self, described: _Layer) -> None:
        """Compute linears without adapters if no adapter of the step changes them."""
        self._modules = self._plan.modules
        for linears, group in zip(described.linears(), self._parts.groups, strict=True):
            linears.a = group.columns.a.data_ptr() if self._plan.touches(group.names) else None

    def _all_hooks(self, bases: Sequence[nn.Module | None]) -> list[dict[int, Callable[..., Any]]]:
        stacks = [base for base in bases if isinstance(base, StackedLinear)]
        modules = [*self._inner, *bases, *(member for stack in stacks for member in stack.members)]
        return [hooks for module in modules if module for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def _hooks_are_idle(self) -> bool:
        """Return whether all hooks are those of module overrides, which stay registered and are idle in this step."""
        hooks = (hook for hooks in self._hooks for hook in hooks.values())
        return all(isinstance(getattr(hook, "__self__", None), ModuleOverrideHook) for hook in hooks)

    def _step(self, batch: ForwardBatch, cos: Tensor, sin: Tensor, block_size: int) -> _Step:
        """Return the description of the step, created in the first layer and reused by the others."""
        own, lora = attention.plan(batch), self._plan.kernel_plan if self._plan.active else None
        if own.step is None or own.step[0] is not lora or own.step[1] is not cos:
            own.step = lora, cos, self._described_step(batch, own, lora, cos, sin, block_size)
        step: _Step = own.step[2]
        return step

    def _described_step(
        self, batch: ForwardBatch, own: NativePlan, lora: LoRAPlan | None, cos: Tensor, sin: Tensor, block_size: int
    ) -> _Step:
        rows = len(batch.input_ids)
        assert cos.shape == sin.shape == (1, rows, self._parts.head_dim), "the whole head is rotated"
        assert cos.is_contiguous() and sin.is_contiguous()
        lora_fields: list[Any] = [(_POINTER * 3)(), None, None, 0]
        if lora is not None:
            kernel: Any = self._parts.groups[0].kernel
            scales = None if lora.scales is None else lora.scales.data_ptr()
            lora_fields = [(_POINTER * 3)(*kernel.steps), lora.segments.data_ptr(), scales, len(lora.segments)]
        return _Step(
            rows, cos.data_ptr(), sin.data_ptr(), batch.slot_mapping.data_ptr(), own.work.data_ptr(), len(own.work),
            own.tables.data_ptr(), block_size, *lora_fields, torch.get_num_threads(),
        )  # fmt: skip


def _linears(group: LoRAGroup) -> _Linears | None:
    """Describe the linears of a group; None if its base is not a `NativeLinear`."""
    inner = group.base.inner if isinstance(group.base, StackedLinear) else group.base
    if type(inner) is not NativeLinear:
        return None
    a, b, sizes = group.columns
    bias = None if inner.bias is None else inner.bias.data_ptr()
    own = inner.packed.data_ptr(), bias, inner.in_features, inner.out_features
    return _Linears(*own, a.data_ptr(), b.data_ptr(), a.shape[1], len(sizes), (_SIZE * 3)(*sizes))

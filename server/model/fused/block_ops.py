"""Triton implementation of `server.model.fusion.BlockOps`, for CUDA."""

from typing import Any

from torch import Tensor, nn

from adapters.runtime.hooks import ModuleOverrideHook
from server.model.attention import triton_paged
from server.model.batch import ForwardBatch
from server.model.fused import triton_fused
from server.model.kv_cache import KVCache
from server.model.llama_layer import LayerParts


class TritonBlockOps:
    """Block operations by Triton kernels, whose sums may be in another order than torch's."""

    exact = False

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_fused.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows = triton_fused.silu_mul(gate_up.reshape(-1, gate_up.shape[-1]))
        return rows.view(*gate_up.shape[:-1], rows.shape[-1])

    def rope_attention(
        self,
        layer: int,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        scale: float,
        window: int | None,
    ) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        query = triton_fused.rope_kv_write(qkv, cos, sin, keys, values, batch.slot_mapping)
        return triton_paged.attend(layer, query.transpose(0, 1), batch, cache, scale, window, None).flatten(1)

    def whole_layer(self, layer: nn.Module, parts: LayerParts) -> "TritonLayer":
        return TritonLayer(layer, parts, self)


class TritonLayer:
    """A decoder layer in eleven launches, adapters aside: four products, three of attention, and between them norm,
    rotation, norm with residual, SiLU, and the last residual."""

    def __init__(self, layer: nn.Module, parts: LayerParts, ops: TritonBlockOps) -> None:
        modules = [module for module in layer.modules() if module is not layer]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._parts, self._ops = parts, ops
        self._current = parts.groups[0].current

    def is_whole(self) -> bool:
        """Return whether no module in the layer has to be called by itself: overrides of modules, such as trained
        norms, are hooks, and stay registered when they are idle."""
        if self._current.plan.module_overrides is not None:
            return False
        hooks = (hook for hooks in self._hooks for hook in hooks.values())
        return all(isinstance(getattr(hook, "__self__", None), ModuleOverrideHook) for hook in hooks)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        parts, ops, residual = self._parts, self._ops, hidden[0]
        qkv, output, gate_up, down = parts.groups
        before: Any
        after: Any
        before, after = parts.norms
        inputs = triton_fused.rms_norm(residual, before.weight, before.variance_epsilon)
        heads = ops.rope_attention(
            parts.index, qkv.forward(inputs), cos[0], sin[0], batch, cache, parts.scale, parts.window
        )
        inputs, residual = triton_fused.add_rms_norm(
            output.forward(heads), residual, after.weight, after.variance_epsilon
        )
        return (residual + down.forward(triton_fused.silu_mul(gate_up.forward(inputs))))[None]

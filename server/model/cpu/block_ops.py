"""C++ implementation of `server.model.fusion.BlockOps`."""

import torch
from torch import nn

from server.model.batch import ForwardBatch
from server.model.cpu.attention import plan_attention
from server.model.cpu.decoder_layer import NativeLayer
from server.model.cpu.library import function
from server.model.kv_cache import KVCache
from server.model.llama_layer import LayerParts


class NativeBlockOps:
    """Block operations for one dtype. Tensors are contiguous except for the strides that are passed."""

    exact = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._silu_mul = function("silu_mul", dtype)
        self._rms_norm = function("rms_norm", dtype)
        self._rope_attention = function("rope_attention", dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        y = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
        self._silu_mul(y.data_ptr(), gate_up.data_ptr(), y.numel() // size, size, torch.get_num_threads())
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        y, size = torch.empty_like(x), x.shape[-1]
        self._rms_norm(
            y.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps, torch.get_num_threads()
        )
        return y

    def whole_layer(self, layer: nn.Module, parts: LayerParts) -> NativeLayer | None:
        return NativeLayer(layer, parts) if self._dtype is torch.bfloat16 else None

    def rope_attention(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        keys, values, own = cache.keys[layer], cache.values[layer], plan_attention(batch)
        rows, width = qkv.shape
        _, block_size, kv_heads, head_dim = keys.shape
        assert cos.shape == sin.shape == (rows, head_dim), "the whole head is rotated"
        heads = width // head_dim - 2 * kv_heads
        out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype)
        self._rope_attention(
            out.data_ptr(), qkv.data_ptr(), qkv.stride(0), cos.contiguous().data_ptr(), sin.contiguous().data_ptr(),
            keys.data_ptr(), values.data_ptr(), batch.slot_mapping.data_ptr(), rows, own.work.data_ptr(), len(own.work),
            own.tables.data_ptr(), heads, kv_heads, head_dim, block_size, window or 0, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

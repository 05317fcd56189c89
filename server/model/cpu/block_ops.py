"""`server.model.blocks.BlockOps` in C++."""

import torch

from server.model.batch import ForwardBatch
from server.model.cpu.attention import attend
from server.model.cpu.library import function
from server.model.kv_cache import KVCache


class NativeBlockOps:
    """For one dtype. Tensors are contiguous but for the strides that are named."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._silu_mul = function("silu_mul", dtype)
        self._rope_write = function("rope_write", dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        y = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
        self._silu_mul(y.data_ptr(), gate_up.data_ptr(), y.numel() // size, size, torch.get_num_threads())
        return y

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
        keys, values = cache.keys[layer], cache.values[layer]
        assert cos.shape == sin.shape == (len(qkv), keys.shape[3]), "the whole head is rotated"
        (rows, width), (kv_heads, head_dim) = qkv.shape, keys.shape[2:]
        heads = width // head_dim - 2 * kv_heads
        self._rope_write(
            qkv.data_ptr(), qkv.stride(0), cos.contiguous().data_ptr(), sin.contiguous().data_ptr(), keys.data_ptr(),
            values.data_ptr(), batch.slot_mapping.data_ptr(), rows, heads, kv_heads, head_dim, torch.get_num_threads(),
        )  # fmt: skip
        query = qkv[:, : heads * head_dim].view(rows, heads, head_dim)
        return attend(layer, query, batch, cache, scale, window, None).flatten(1)

"""The tensors of the paged KV cache. server/engine/kv_blocks/block_manager.py tracks the ownership of blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from adapters.device.lazy_zeros import zeros


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The shape of the KV cache: `(key/value heads, head dimension)` per layer. `windows` are the numbers of latest
    keys that a layer's tokens see (None: all), for layers without other changes to their scores. `window` is the
    largest one of all layers (None: in some layer, tokens see all keys)."""

    layers: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    windows: Mapping[int, int | None] = field(default_factory=dict)
    window: int | None = None

    def bytes_per_token(self) -> int:
        return sum(2 * heads * head_dim for heads, head_dim in self.layers) * self.dtype.itemsize


class KVCache:
    """A key and a value tensor `[num_blocks, block_size, kv_heads, head_dim]` per layer.

    A token's slot is `block_id * block_size + offset`; `slot_mapping` lists the slots of a step's tokens.
    Invariant: every element is finite, because attention multiplies elements past a sequence's end by zero.
    """

    def __init__(self, shape: CacheShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.keys, self.values = (
            [
                zeros(num_blocks, block_size, heads, head_dim, dtype=shape.dtype, device=device)
                for heads, head_dim in shape.layers
            ]
            for _ in range(2)
        )

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store `key` and `value` `[tokens, kv_heads, head_dim]` in the slots `[tokens]` (int64)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slot_mapping, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slot_mapping, value)

    def prepare(self, suspect: list[int], copies: list[tuple[int, int]]) -> None:
        """Zero `suspect` blocks, then make the `copies` of blocks and empty that list."""
        self.scrub(suspect)
        self.copy(copies)
        copies.clear()

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks; each pair is a block and the one that gets its content."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.keys[0].device).T
            for tensor in (*self.keys, *self.values):
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def scrub(self, block_ids: list[int]) -> None:
        """Zero blocks that may contain non-finite values before they are reused."""
        if block_ids:
            indices = torch.tensor(block_ids, device=self.keys[0].device)
            for tensor in (*self.keys, *self.values):
                tensor.index_fill_(0, indices, 0)

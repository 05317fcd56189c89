"""The first seam into the model: one attention function, registered with transformers' `AttentionInterface`.

transformers calls it per layer with the queries, keys and values of the step's flattened tokens and with whatever
keywords the model was called with; ours is `batch` (the `ForwardBatch`) and `kv_cache`.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from server.model.attention.paged import paged_attention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache

IMPLEMENTATION = "loraplex_paged"

# Keywords that models pass along and that do not change what attention computes here.
_INERT = {
    "dropout", "position_ids", "output_attentions", "output_hidden_states", "use_cache", "cache_position",
    "position_embeddings", "logits_to_keep", "return_dict", "is_causal", "layer_type", "past_key_values",
    "output_router_logits", "head_mask", "block_sequence_ids",
}  # fmt: skip


class UnsupportedAttention(ValueError):
    """The model asks its attention for something that the paged implementation does not compute."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: ForwardBatch,
    kv_cache: KVCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[1, heads, rows, head_dim]`, `key` and `value` `[1, kv_heads, rows, head_dim]`.

    Returns `[1, rows, heads, head_dim]`. Raises `UnsupportedAttention` for keywords with a meaning that is not ours.
    """
    unknown = [
        name for name, given in others.items() if name not in _INERT and given is not None and given is not False
    ]
    if unknown or attention_mask is not None:
        raise UnsupportedAttention(f"attention with {', '.join(unknown) or 'an explicit mask'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = paged_attention(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        batch,
        kv_cache,
        scale,
        sliding_window,
        softcap,
    )
    return out[None], None


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)

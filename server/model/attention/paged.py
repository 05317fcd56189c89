"""Attention over the paged KV cache in plain torch, for any device; the reference for faster implementations."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from server.model.attention.padded import DecodeGroup, PrefillChunk, plan_attention
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache


def paged_attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: ForwardBatch,
    cache: KVCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Write the step's keys and values into the cache, then attend through the block tables.

    query `[heads, rows, head_dim]`, key and value `[kv_heads, rows, head_dim]`; returns `[rows, heads, head_dim]`.
    `window`: number of latest keys, its own included, that a token sees. `softcap`: scores become
    `cap * tanh(score / cap)`.
    """
    cache.write(layer, key.transpose(0, 1), value.transpose(0, 1), batch.slot_mapping)
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
    plan = plan_attention(batch)
    for group in plan.decode_groups:
        out[group.rows] = _decode(layer, query, group, cache, scale, window, softcap)
    for chunk in plan.prefill_chunks:
        out[chunk.start : chunk.end] = _prefill(layer, query, key, value, chunk, cache, scale, window, softcap)
    return out


def _decode(
    layer: int,
    query: torch.Tensor,
    group: DecodeGroup,
    cache: KVCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend with one query per sequence; returns `[B, heads, head_dim]`. Query heads that share a key head become
    query positions of one head."""
    keys = cache.keys[layer][group.block_tables].flatten(1, 2).transpose(1, 2)  # [B, kv_heads, keys, head_dim]
    values = cache.values[layer][group.block_tables].flatten(1, 2).transpose(1, 2)
    kv_heads = keys.shape[1]
    queries = query[:, group.rows].transpose(0, 1)
    queries = queries.reshape(len(group.rows), kv_heads, -1, query.shape[-1])  # [B, kv_heads, heads / kv_heads, d]
    out = _attend(queries, keys, values, group.mask(window, cache.block_size), scale, softcap)
    return out.flatten(1, 2)


def _prefill(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: PrefillChunk,
    cache: KVCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend with the new tokens of one sequence; returns `[new tokens, heads, head_dim]`."""
    queries = query[:, chunk.start : chunk.end]
    num_new = chunk.end - chunk.start
    if num_new == chunk.context_len:  # the whole context is in this step: no need to read it back
        keys, values = key[:, chunk.start : chunk.end], value[:, chunk.start : chunk.end]
    else:
        keys = cache.keys[layer][chunk.block_table].flatten(0, 1)[: chunk.context_len].transpose(0, 1)
        values = cache.values[layer][chunk.block_table].flatten(0, 1)[: chunk.context_len].transpose(0, 1)
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    out = _attend(queries[None], keys[None], values[None], chunk.mask(window), scale, softcap)
    return out[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Compute masked attention over `[batch, heads, positions, head_dim]`."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)) * scale / softcap)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value

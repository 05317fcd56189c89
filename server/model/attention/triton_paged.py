"""Attention over the paged KV cache in Triton, for CUDA. It has no other dependencies.

One program computes one tile of one sequence's new tokens and one key head, with the query heads that share it, as
far as a tile has rows for them (models with one key head have up to 71). A prefill tile reads its keys in one program.
Decode tiles divide long contexts among `SPLITS` programs, and a second kernel reduces the partial results in order
(split keys as in Flash-Decoding; online softmax as in FlashAttention). The split depends on the context length alone,
so a row's result does not depend on its batch. Keys past a sequence's end are not read.

Grids depend on the layout's capacities only, so a captured graph can run any decode step that fits its layout. Tile
sizes are calculated and not yet measured on a GPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from server.model.attention.triton_layout import TILE_TOKENS, AttentionLayout, build_layout
from server.model.batch import ForwardBatch
from server.model.kv_cache import KVCache

SPLITS = 16
MIN_SPLIT = 256  # keys; fewer do not justify a separate program
MIN_ROWS = 16  # of a tile: the minimum for tensor cores
MAX_ROWS = 128  # of a tile: what the registers of eight warps hold with heads of 128 dimensions


@triton.jit
def _write_kv(
    key, value, keys, values, slots, key_head_stride, key_row_stride, value_head_stride, value_row_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK_D)
    own = d < HEAD_DIM
    target = (slot * HEADS + head).to(tl.int64) * HEAD_DIM + d
    source = row.to(tl.int64)
    tl.store(keys + target, tl.load(key + head * key_head_stride + source * key_row_stride + d, mask=own), mask=own)
    tl.store(
        values + target, tl.load(value + head * value_head_stride + source * value_row_stride + d, mask=own), mask=own
    )


@triton.jit
def _attend(
    query, keys, values, tiles, tables, out, maxima, sums, parts, query_head_stride, query_row_stride, scale,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    tile, key_head, split = tl.program_id(0), tl.program_id(1) // tl.cdiv(GROUP, SHARE), tl.program_id(2)
    row, tokens = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    position, table = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    m, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, member = m // SHARE, tl.program_id(1) % tl.cdiv(GROUP, SHARE) * SHARE + m % SHARE
    head = key_head * GROUP + member
    own_row = (token < tokens) & (member < GROUP)
    own = own_row[:, None] & (d < HEAD_DIM)[None, :]
    q_offset = head * query_head_stride + (row + token).to(tl.int64) * query_row_stride
    q = tl.load(query + q_offset[:, None] + d[None, :], mask=own, other=0.0)
    q_position = position + token

    end = position + tokens
    start = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    if NUM_SPLITS > 1:
        share = tl.maximum(tl.cdiv(tl.cdiv(end - start, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS, LEAST)
        start += split * share
        end = tl.minimum(start + share, end)

    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        n = first + tl.arange(0, BLOCK_KEYS)
        inside = n < end
        block = tl.load(tables + table + n // PAGE, mask=inside, other=0)
        offset = ((block.to(tl.int64) * PAGE + n % PAGE) * KEY_HEADS + key_head) * HEAD_DIM
        k = tl.load(keys + offset[None, :] + d[:, None], mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = SOFTCAP - 2 * SOFTCAP / (tl.exp(2 * scores / SOFTCAP) + 1)  # SOFTCAP * tanh(scores / SOFTCAP)
        seen = inside[None, :] & (n[None, :] <= q_position[:, None])
        if WINDOW > 0:
            seen &= n[None, :] > q_position[:, None] - WINDOW
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))  # log2(e), because exp2 is cheaper than exp
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row may see no key of this block
        weights = tl.exp2(scores - level[:, None])
        correction = tl.exp2(highest - level)
        v = tl.load(values + offset[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        total = total * correction + tl.sum(weights, 1)
        highest = new_highest

    if NUM_SPLITS > 1:
        part = (tile * KEY_HEADS * GROUP + head) * NUM_SPLITS + split
        tl.store(maxima + part, highest, mask=own_row)
        tl.store(sums + part, total, mask=own_row)
        tl.store(parts + part.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], acc, mask=own)
    else:
        o_offset = ((row + token).to(tl.int64) * (KEY_HEADS * GROUP) + head) * HEAD_DIM
        tl.store(out + o_offset[:, None] + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=own)


@triton.jit
def _reduce_splits(
    tiles, out, maxima, sums, parts,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    part = (tile * HEADS + head) * NUM_SPLITS + split
    highest, total = tl.load(maxima + part), tl.load(sums + part)
    weights = tl.exp2(highest - tl.max(highest, 0))
    # A split without keys has sum 0. NaN is not 0, so it is reduced and remains visible.
    used = (total != 0)[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(parts + part.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], mask=used, other=0.0)
    merged = tl.sum(acc * weights[:, None], 0) / tl.sum(total * weights, 0)
    row = tl.load(tiles + tile * 4).to(tl.int64)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=d < HEAD_DIM)


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
    """Implement `paged.paged_attention`: write the step's keys and values, attend through the block tables.

    query `[heads, rows, head_dim]`, key and value `[kv_heads, rows, head_dim]`, each dense in its last dimension;
    returns `[rows, heads, head_dim]`. Rows whose slot is -1 are computed but their keys and values are not stored.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    kv_heads, rows, head_dim = key.shape
    _write_kv[(rows, kv_heads)](
        key, value, keys, values, batch.slot_mapping, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim),
    )  # fmt: skip
    return attend(layer, query, batch, cache, scale, window, softcap)


def attend(
    layer: int,
    query: torch.Tensor,
    batch: ForwardBatch,
    cache: KVCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend with `query`, as in `paged_attention`, to keys and values that are in the cache, the step's included."""
    if batch.attention_plan is None:
        batch.attention_plan = build_layout(batch.sequences, cache.block_size, query.device)
    layout: AttentionLayout = batch.attention_plan
    heads, rows, head_dim = query.shape
    keys, values = cache.keys[layer], cache.values[layer]
    kv_heads, block_d = keys.shape[2], _block_d(head_dim)
    out = query.new_empty(rows, heads, head_dim)
    shape: dict[str, Any] = {
        "WINDOW": window or 0, "SOFTCAP": softcap or 0.0, "KEY_HEADS": kv_heads, "GROUP": heads // kv_heads,
        "PAGE": cache.block_size, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "LEAST": MIN_SPLIT,
    }  # fmt: skip
    strides = query.stride(0), query.stride(1), scale
    if layout.num_prefills:
        parts, tile = tile_shape(TILE_TOKENS, heads // kv_heads, block_d, keys.element_size())
        _attend[(layout.num_prefills, kv_heads * parts, 1)](
            query, keys, values, layout.prefill_tiles, layout.tables, out, out, out, out, *strides,
            NUM_SPLITS=1, **shape, **tile,
        )  # fmt: skip
    if layout.num_decodes:
        maxima, sums = torch.empty(2, layout.num_decodes * heads * SPLITS, dtype=torch.float32, device=query.device)
        partial = torch.empty(len(maxima) * head_dim, dtype=torch.float32, device=query.device)
        parts, tile = tile_shape(1, heads // kv_heads, block_d, keys.element_size())
        _attend[(layout.num_decodes, kv_heads * parts, SPLITS)](
            query, keys, values, layout.decode_tiles, layout.tables, out, maxima, sums, partial, *strides,
            NUM_SPLITS=SPLITS, **shape, **tile,
        )  # fmt: skip
        _reduce_splits[(layout.num_decodes, heads)](
            layout.decode_tiles, out, maxima, sums, partial,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, NUM_SPLITS=SPLITS,
        )  # fmt: skip
    return out


def _block_d(head_dim: int) -> int:
    return int(max(triton.next_power_of_2(head_dim), 16))


def tile_shape(tokens: int, group: int, block_d: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """Return among how many programs the `group` query heads of a key head are divided, and the shape of their tiles of
    `tokens` tokens. Registers and shared memory decide: see tests/test_compile_matrix.py."""
    wide = 4 if itemsize == 4 else 1  # float32 is multiplied without tensor cores, from registers
    most = max(MAX_ROWS // wide * 128 // max(block_d, 128), 32)
    parts = -(-group // max(most // tokens, 1))
    share = -(-group // parts)
    rows = max(1 << math.ceil(math.log2(tokens * share)), MIN_ROWS)
    block_keys = max(64 * 128 // max(block_d * wide, 128), 16)
    return parts, {"SHARE": share, "ROWS": rows, "BLOCK_KEYS": block_keys, "num_warps": 8 if rows >= MAX_ROWS else 4}

"""The fused functions in Triton, for CUDA. See the contract in this package's docstring.

One program computes a row (norms), a piece of a row (SiLU), or a head of a row (RoPE). With adapters, the expand of the
LoRA product happens where its consumer reads the linear's output: the row's `v` is loaded, each of its rank columns
reads a piece of B, and the sum is never written. This is designed for decode, where B is read for few rows.

Piece sizes are calculated and not yet measured on a GPU. The server uses the functions without a delta (block_ops.py);
those with one must first measure faster than the expand kernel (load_tests/gpu).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.triton_lora import Delta

PIECE = 512  # outputs of one SiLU program
NORM_STEP = 4  # rank columns that a program over a whole row holds at a time


@triton.jit
def row_delta(
    v, b, lora_rows, blocks, num_rows, num_blocks, row, linear, N, n, mask,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return the adapters' contribution to outputs `n` of `row`, for a linear with N outputs and B at `b`."""
    inside = row < num_rows
    own = lora_rows + row * 3
    tile_row = tl.load(own, mask=inside, other=0)
    first, count = tl.load(own + 1, mask=inside, other=0), tl.load(own + 2, mask=inside, other=0)
    acc = tl.zeros(n.shape, dtype=tl.float32)
    for block in range(first, first + count):
        meta = blocks + block * 5
        scale = tl.load(meta + 4).to(tl.float32, bitcast=True)
        b_rows = b + tl.load(meta + 2).to(tl.int64) * N
        for start in tl.static_range(0, COLUMNS, STEP):
            column = start + tl.arange(0, STEP)
            vs = tl.zeros((STEP,), dtype=tl.float32)
            for part in tl.static_range(PARTS):
                plane = v + ((linear * PARTS + part) * num_blocks + block).to(tl.int64) * (ROWS * COLUMNS)
                vs += tl.load(plane + tile_row * COLUMNS + column)
            used = (column < tl.load(meta + 3))[:, None] & mask[None, :]
            outputs = tl.load(b_rows + column[:, None] * N + n[None, :], mask=used, other=0.0)
            acc += tl.sum((vs * scale)[:, None] * outputs.to(tl.float32), 0)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _rms_norm(
    x, residual, weight, out, total, x_stride, residual_stride, eps,
    v, b, lora_rows, blocks, num_rows, num_blocks, num_columns,
    N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, LORA: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    mask = n < N
    values = tl.load(x + row.to(tl.int64) * x_stride + n, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        values += row_delta(
            v, b, lora_rows, blocks, num_rows, num_blocks, row, 0, N, n, mask,
            PARTS, ROWS, COLUMNS, STEP,
        )  # fmt: skip
    if ADD:
        values += tl.load(residual + row.to(tl.int64) * residual_stride + n, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row.to(tl.int64) * N + n, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / N + eps)
    weights = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)  # rounded before the weight, as in the models
    tl.store(out + row.to(tl.int64) * N + n, (normed * weights).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _silu_mul(
    gate_up, out, stride, v, b, lora_rows, blocks, num_rows, num_blocks, num_columns,
    N: tl.constexpr, BLOCK: tl.constexpr, LORA: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    source = gate_up + row.to(tl.int64) * stride + n
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + N, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        gate += row_delta(
            v, b, lora_rows, blocks, num_rows, num_blocks, row, 0, N, n, mask,
            PARTS, ROWS, COLUMNS, STEP,
        )  # fmt: skip
        up += row_delta(
            v, b + num_columns.to(tl.int64) * N, lora_rows, blocks, num_rows, num_blocks, row, 1, N, n, mask,
            PARTS, ROWS, COLUMNS, STEP,
        )  # fmt: skip
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row.to(tl.int64) * N + n, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _rope_kv_write(
    qkv, cos, sin, slots, query, keys, values, stride, cos_stride, sin_stride,
    v, b, lora_rows, blocks, num_rows, num_blocks, num_columns,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
    LORA: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kind = tl.where(head < HEADS, 0, tl.where(head < HEADS + KV_HEADS, 1, 2))  # query, key, value
    slot = tl.load(slots + row)
    if (kind > 0) & (slot < 0):
        return
    before = tl.where(kind == 0, 0, HEADS + (kind - 1) * KV_HEADS)  # heads of the siblings
    N = tl.where(kind == 0, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    d = tl.arange(0, BLOCK)
    own = d < HEAD_DIM
    turned = (d < ROTARY) & (kind < 2)
    partner = tl.where(turned, tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2), d)
    source = qkv + row.to(tl.int64) * stride + head * HEAD_DIM
    plain = tl.load(source + d, mask=own, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
    if LORA:
        first = (head - before) * HEAD_DIM
        b_own = b + num_columns.to(tl.int64) * (before * HEAD_DIM)
        plain += row_delta(
            v, b_own, lora_rows, blocks, num_rows, num_blocks, row, kind, N, first + d, own,
            PARTS, ROWS, COLUMNS, STEP,
        )  # fmt: skip
        other += row_delta(
            v, b_own, lora_rows, blocks, num_rows, num_blocks, row, kind, N, first + partner, turned,
            PARTS, ROWS, COLUMNS, STEP,
        )  # fmt: skip
    c = tl.load(cos + row.to(tl.int64) * cos_stride + d, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + row.to(tl.int64) * sin_stride + d, mask=turned, other=0.0).to(tl.float32)
    result = (plain * c + tl.where(d < ROTARY // 2, -other, other) * s).to(query.dtype.element_ty)
    cached = (slot * KV_HEADS + head - before).to(tl.int64) * HEAD_DIM + d
    if kind == 0:
        tl.store(query + (row.to(tl.int64) * HEADS + head) * HEAD_DIM + d, result, mask=own)
    elif kind == 1:
        tl.store(keys + cached, result, mask=own)
    else:
        tl.store(values + cached, result, mask=own)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _norm(x, x, weight, out, out, eps, None, add=False)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: Delta | None = None
) -> tuple[Tensor, Tensor]:
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _norm(x, residual, weight, out, total, eps, delta, add=True)
    return out, total


def _norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
    delta: Delta | None,
    add: bool,
) -> None:
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    tensors, shape = _lora(delta, x, NORM_STEP)
    _rms_norm[(rows,)](
        x, residual, weight, out, total, x.stride(0), residual.stride(0), eps, *tensors,
        N=hidden, BLOCK=block, ADD=add, num_warps=min(max(block // 512, 1), 16), **shape,
    )  # fmt: skip


def silu_mul(gate_up: Tensor, delta: Delta | None = None) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    tensors, shape = _lora(delta, gate_up)
    grid = (rows, triton.cdiv(size, PIECE))
    _silu_mul[grid](gate_up, out, gate_up.stride(0), *tensors, N=size, BLOCK=PIECE, **shape)
    return out


def rope_kv_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, delta: Delta | None = None
) -> Tensor:
    rows, (kv_heads, head_dim) = len(qkv), keys.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(rows, heads, head_dim)
    tensors, shape = _lora(delta, qkv)
    _rope_kv_write[(rows, heads + 2 * kv_heads)](
        qkv, cos, sin, slots, query, keys, values, qkv.stride(0), cos.stride(0), sin.stride(0), *tensors,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROTARY=cos.shape[-1],
        BLOCK=max(triton.next_power_of_2(head_dim), 16), num_warps=1, **shape,
    )  # fmt: skip
    return query


def _lora(delta: Delta | None, unused: torch.Tensor, step: int = 16) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the kernel arguments of a delta; placeholders if there is none."""
    if delta is None:
        return (unused, unused, unused, unused, 0, 0, 0), {
            "LORA": False,
            "PARTS": 1,
            "ROWS": 1,
            "COLUMNS": 1,
            "STEP": 1,
        }
    plan = delta.plan
    tensors = delta.v, delta.b, plan.rows, plan.blocks, plan.num_rows, plan.num_blocks, delta.columns
    return tensors, {
        "LORA": True,
        "PARTS": delta.parts,
        "ROWS": plan.tile_rows,
        "COLUMNS": delta.v.shape[-1],
        "STEP": step,
    }

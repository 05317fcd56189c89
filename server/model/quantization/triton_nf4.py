"""Products with weights in bitsandbytes' NF4 layout, for decode batches, in Triton.

    packed  uint8 [out_features, in_features / 2]   two weights per byte, the lower index in the high half
    absmax  float32 [out_features, in_features / 64]  one scale per 64 weights; nested scales are resolved at load

An iteration of the loop covers the 64 inputs of one scale, so the scale is applied to the float32 partial sum and not
to each weight. bitsandbytes rounds `code * absmax` to the compute dtype instead; both round each weight once. Not yet
measured on a GPU, and therefore not used by default; the benchmark compares it (load_tests/gpu).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 64  # weights per scale
MAX_ROWS = 64  # beyond this, dequantizing the weight once and using a library is faster
BLOCK_OUT = 64
PART_IN = 1024  # in_features of one program
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _nf4_matmul(
    x, packed, absmax, code, planes, rows, N, x_stride,
    K: tl.constexpr, PART: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n, half = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, SCALED // 2)
    part = tl.program_id(1)
    own_m, own_n = m < rows, n < N
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    bytes_of = packed + n.to(tl.int64)[None, :] * (K // 2)
    acc = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, PART, SCALED):
        k = part * PART + start
        inside = k < K  # the last part may be shorter
        pairs = tl.load(bytes_of + k // 2 + half[:, None], mask=own_n[None, :] & inside, other=0)
        even = tl.load(x_rows + k + 2 * half[None, :], mask=own_m[:, None] & inside, other=0.0)
        odd = tl.load(x_rows + k + 2 * half[None, :] + 1, mask=own_m[:, None] & inside, other=0.0)
        high, low = tl.load(code + (pairs >> 4).to(tl.int32)), tl.load(code + (pairs & 15).to(tl.int32))
        partial = tl.dot(even, high, input_precision="ieee")
        partial = tl.dot(odd, low, partial, input_precision="ieee")
        acc += partial * tl.load(absmax + n.to(tl.int64) * (K // SCALED) + k // SCALED, mask=own_n & inside, other=0.0)
    plane = planes + (part * rows + m).to(tl.int64)[:, None] * N
    tl.store(plane + n[None, :], acc.to(planes.dtype.element_ty), mask=own_m[:, None] & own_n[None, :])


@dataclass(frozen=True, slots=True)
class NF4Weight:
    packed: torch.Tensor
    absmax: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 2


@cache
def _code(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(CODE, dtype=dtype, device=device)


def nf4_weight(packed: torch.Tensor, state: Any) -> NF4Weight:
    """Convert the bytes and the `QuantState` of a bitsandbytes 4-bit weight. Raises ValueError unless it is NF4 in
    blocks of 64 along whole rows."""
    out_features, in_features = state.shape
    if state.quant_type != "nf4" or state.blocksize != BLOCK or in_features % BLOCK:
        raise ValueError(f"{state.quant_type} in blocks of {state.blocksize} over {in_features} inputs is unsupported")
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.float().reshape(out_features, in_features // BLOCK)
    return NF4Weight(packed.reshape(out_features, in_features // 2), scales)


def nf4_matmul(x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
    """Return `x @ W.T` for x `[rows, in_features]` of at most `MAX_ROWS` rows; sums in float32, rounded once."""
    rows, in_features, out_features = len(x), weight.in_features, len(weight.packed)
    assert 0 < rows <= MAX_ROWS and x.shape[1] == in_features, x.shape
    parts = triton.cdiv(in_features, PART_IN)
    planes = x.new_empty(parts, rows, out_features, dtype=torch.float32 if parts > 1 else x.dtype)
    code = _code(x.dtype, x.device)
    _nf4_matmul[(triton.cdiv(out_features, BLOCK_OUT), parts)](
        x, weight.packed, weight.absmax, code, planes, rows, out_features, x.stride(0),
        K=in_features, PART=PART_IN, SCALED=BLOCK, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_N=BLOCK_OUT,
    )  # fmt: skip
    return planes[0] if parts == 1 else planes.sum(0).to(x.dtype)

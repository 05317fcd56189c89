"""One launch of each kernel's form over memory without slack, for a memory checker to watch."""

from typing import Any

import torch

from adapters.kernels.segments import Segment, Segments
from adapters.kernels.triton_lora import TritonKernel
from server.model.attention import triton_paged
from server.model.batch import ForwardBatch, SequenceRows
from server.model.fused import triton_fused
from server.model.kv_cache import CacheShape, KVCache
from server.model.quantization.triton_nf4 import NF4Weight, nf4_matmul

HALF = torch.bfloat16


def run(device: torch.device) -> None:
    for rows in (3, 70):
        lora(rows, device)
        fused(rows, device)
        nf4(min(rows, 64), device)
    for heads, kv_heads, head_dim in ((9, 3, 64), (28, 4, 128), (48, 1, 128), (8, 1, 256)):
        attention(heads, kv_heads, head_dim, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel was launched", flush=True)


def lora(rows: int, device: torch.device) -> None:
    options: dict[str, Any] = {"dtype": HALF, "device": device}
    kernel, columns, inputs, sizes = TritonKernel(device), 48, 576, (576, 192, 192)
    plan = kernel.plan_segments(Segments((Segment(0, rows - 1, 0, 16), Segment(rows - 1, rows, 32, 48))))
    a, b = torch.randn(3, columns, inputs, **options), torch.randn(columns * sum(sizes), **options)
    kernel.add_lora(torch.zeros(rows, sum(sizes), **options), torch.randn(rows, inputs, **options), a, b, sizes, plan)


def fused(rows: int, device: torch.device) -> None:
    options: dict[str, Any] = {"dtype": HALF, "device": device}
    x, weight = torch.randn(rows, 576, **options), torch.ones(576, **options)
    triton_fused.rms_norm(x, weight, 1e-5)
    triton_fused.add_rms_norm(x, x, weight, 1e-5)
    triton_fused.silu_mul(torch.randn(rows, 2 * 1536, **options))
    keys, values = torch.zeros(2, -(-rows // 16), 16, 3, 64, **options)
    slots, angles = torch.arange(rows, device=device), torch.randn(rows, 64, **options)
    triton_fused.rope_kv_write(torch.randn(rows, 15 * 64, **options), angles, angles, keys, values, slots)


def attention(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
    contexts = [(700, 1), (16, 1), (40, 33)]
    sequences, row, block = [], 0, 0
    for length, new in contexts:
        blocks = -(-length // 16)
        sequences.append(SequenceRows(row, row + new, length, list(range(block, block + blocks))))
        row, block = row + new, block + blocks
    slots = [
        seq.block_table[position // 16] * 16 + position % 16
        for seq, (length, new) in zip(sequences, contexts, strict=True)
        for position in range(length - new, length)
    ]
    cache = KVCache(CacheShape(((kv_heads, head_dim),), HALF), block, 16, device)
    query, new = (torch.randn(n, row, head_dim, dtype=HALF, device=device) for n in (heads, kv_heads))
    kept = torch.tensor(slots, device=device)
    batch = ForwardBatch(kept, kept, kept, kept, sequences, 16)
    triton_paged.paged_attention(0, query, new, new, batch, cache, 0.1, None, None)


def nf4(rows: int, device: torch.device) -> None:
    packed = torch.randint(0, 256, (192, 288), dtype=torch.uint8, device=device)
    weight = NF4Weight(packed, torch.rand(192, 9, device=device))
    nf4_matmul(torch.randn(rows, 576, dtype=HALF, device=device), weight)

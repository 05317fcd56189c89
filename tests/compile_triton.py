"""Compiles every Triton kernel for NVIDIA GPUs of compute capability 9.0, on a machine that may have none: each
operation runs on CPU tensors with the launch replaced by a compilation to machine code. Prints what was compiled.

    TRITON_INTERPRET=0 python -m tests.compile_triton
"""

import inspect
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

H200 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 << 10  # bytes that one program can have
CPU = torch.device("cpu")


def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    values = inspect.signature(kernel.fn).bind(*args, **named).arguments
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else mangle_type(value) for name, value in values.items()}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if _is_aligned(values[name])}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=H200, options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY, (kernel.fn.__name__, compiled.metadata.shared)
    print(
        kernel.fn.__name__,
        compiled.metadata.shared,
        *sorted({kind for kind in signature.values() if kind.startswith("*")}),
    )


def _is_aligned(value: Any) -> bool:
    """What a launch finds out by itself: loads of whole vectors, and copies in the background, depend on it."""
    return isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)


def lora(dtype: torch.dtype) -> None:
    from adapters.kernels.segments import Segment, Segments
    from adapters.kernels.triton_lora import TritonKernel

    kernel = TritonKernel(CPU)
    for rows, in_features in ((1, 4096), (64, 14336)):
        x, y = torch.zeros(rows, in_features, dtype=dtype), torch.zeros(rows, 4096, dtype=dtype)
        a, b = torch.zeros(32, in_features, dtype=dtype), torch.zeros(32, 4096, dtype=dtype)
        plan = kernel.plan_segments(Segments((Segment(0, rows, 0, 32),)))
        kernel.add_lora(y, x, a[None], b, (4096,), plan)
        kernel.add_lora(y, x, torch.stack([a, a, a]), b, (2048, 1024, 1024), plan)


def attention(dtype: torch.dtype) -> None:
    from server.model.attention import triton_paged
    from server.model.batch import ForwardBatch, SequenceRows
    from server.model.kv_cache import CacheShape, KVCache

    sequences = [SequenceRows(0, 1, 16, [0]), SequenceRows(1, 17, 16, [1])]
    rows = torch.zeros(17, dtype=torch.int64)
    large = [(32, 8, 128, None, None), (8, 4, 256, 8, None)] if dtype is torch.bfloat16 else []
    for heads, kv_heads, head_dim, window, softcap in [(9, 3, 64, 16, 30.0), *large]:
        cache = KVCache(CacheShape(((kv_heads, head_dim),), dtype), 2, 16, CPU)
        query, new = torch.zeros(heads, 17, head_dim, dtype=dtype), torch.zeros(kv_heads, 17, head_dim, dtype=dtype)
        batch = ForwardBatch(rows, rows, rows, rows, sequences, 16)
        triton_paged.paged_attention(0, query, new, new, batch, cache, 0.1, window, softcap)


def nf4(dtype: torch.dtype) -> None:
    from server.model.quantization.triton_nf4 import NF4Weight, nf4_matmul

    weight = NF4Weight(torch.zeros(64, 1024, dtype=torch.uint8), torch.zeros(64, 32))
    for rows in (1, 64):
        nf4_matmul(torch.zeros(rows, 2048, dtype=dtype), weight)


def fused(dtype: torch.dtype) -> None:
    from adapters.kernels.segments import Segment, Segments
    from adapters.kernels.triton_lora import TritonKernel
    from server.model.fused import triton_fused

    kernel = TritonKernel(CPU)
    rows, hidden, size, heads, head_dim = 8, 4096, 14336, 8, 128
    plan = kernel.plan_segments(Segments(tuple(Segment(row, row + 1, 0, 32) for row in range(rows))))

    def delta(in_features: int, *sizes: int) -> Any:
        a, b = torch.zeros(len(sizes), 32, in_features, dtype=dtype), torch.zeros(32 * sum(sizes), dtype=dtype)
        return kernel.shrink(torch.zeros(rows, in_features, dtype=dtype), a, b, sizes, plan)

    x, weight = torch.zeros(rows, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    gate_up, qkv = torch.zeros(rows, 2 * size, dtype=dtype), torch.zeros(rows, 3 * heads * head_dim, dtype=dtype)
    keys = torch.zeros(2, 16, heads, head_dim, dtype=dtype)
    angles, slots = torch.zeros(rows, head_dim, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    triton_fused.rms_norm(x, weight, 1e-5)
    for adapters in (False, True):
        triton_fused.add_rms_norm(x, x, weight, 1e-5, delta(size, hidden) if adapters else None)
        triton_fused.silu_mul(gate_up, delta(hidden, size, size) if adapters else None)
        siblings = delta(hidden, *[heads * head_dim] * 3) if adapters else None
        triton_fused.rope_kv_write(qkv, angles, angles, keys, keys, slots, siblings)


OPERATIONS = [lora, attention, nf4, fused]


def main() -> None:
    JITFunction.run = compile_instead
    for operation in OPERATIONS:
        for dtype in (torch.bfloat16, torch.float32):
            operation(dtype)


if __name__ == "__main__":
    main()

"""The LoRA product in C++, and torch matmuls for segments of very many rows.

The source beside this file is compiled on first use (see compiled.py).
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from adapters.kernels import split_b
from adapters.kernels.compiled import declared
from adapters.kernels.grouped import add_segments
from adapters.segments import Segment, Segments

SOURCE = Path(__file__).with_name("lora_cpu.cpp")
MATMUL_WORK = 4096  # rows times rank of a segment, from which on matmuls are faster, where they compute in its dtype
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [
    _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE,
    ctypes.c_int,
]  # fmt: skip
_STEPS = ("lora_prepare_bf16", "lora_shrink_bf16", "lora_expand_bf16")


@dataclass(frozen=True, slots=True)
class NativePlan:
    """`small` is an int64 `[count, 4]` tensor of (start, end, lo, hi), read by the C++ side; `scales` are theirs, in
    float32, None when all are 1."""

    small: torch.Tensor
    scales: torch.Tensor | None
    large: tuple[Segment, ...]


class NativeKernel:
    name = "native"
    DTYPES: ClassVar = {torch.bfloat16: "lora_add_bf16", torch.float32: "lora_add_f32"}

    def __init__(self, library: Path, matmul_work: float = MATMUL_WORK) -> None:
        self._matmul_work = matmul_work
        loaded = ctypes.CDLL(str(library))
        self._functions = {dtype: declared(loaded, name, _ARGUMENTS) for dtype, name in self.DTYPES.items()}
        self.steps = [ctypes.cast(loaded[name], _POINTER).value for name in _STEPS]  # of bf16, for C++ that calls them

    def plan(self, segments: Segments) -> NativePlan:
        small = [s for s in segments.items if self._is_small(s)]
        taken = set(small)
        return NativePlan(
            torch.tensor([(s.start, s.end, s.lo, s.hi) for s in small], dtype=torch.int64).reshape(-1, 4),
            torch.tensor([s.scale for s in small]) if any(s.scale != 1 for s in small) else None,
            tuple(s for s in segments.items if s not in taken),
        )

    def _is_small(self, segment: Segment) -> bool:
        return (segment.end - segment.start) * (segment.hi - segment.lo) < self._matmul_work

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        sizes: tuple[int, ...],
        plan: NativePlan,
    ) -> None:
        linears, columns, in_features = a.shape
        if count := plan.small.shape[0]:
            self._functions[y.dtype](
                y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), a.data_ptr(), b.data_ptr(), in_features,
                columns, _c_sizes(sizes), linears, plan.small.data_ptr(),
                None if plan.scales is None else plan.scales.data_ptr(), count, torch.get_num_threads(),
            )  # fmt: skip
        if plan.large:
            for own_y, own_a, own_b in zip(torch.split(y, list(sizes), 1), a, split_b(b, columns, sizes), strict=True):
                add_segments(own_y, x, own_a, own_b, plan.large)


@cache
def _c_sizes(sizes: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(sizes))(*sizes)

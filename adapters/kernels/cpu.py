"""The LoRA product in C++, for segments of any length.

The source beside this file is compiled on first use (see `adapters.device.cpp_build`). No sum depends on the number of
rows of a segment, so the result for a prompt is bit-identical however the prompt is split into steps.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from adapters.device.cpp_build import declared
from adapters.kernels.segments import Segments

SOURCE = Path(__file__).with_name("lora_cpu.cpp")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = [
    _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE,
    ctypes.c_int,
]  # fmt: skip
_PARTS = ("lora_prepare_bf16", "lora_shrink_bf16", "lora_expand_bf16")


@dataclass(frozen=True, slots=True)
class NativeLoRAPlan:
    """`segments` is an int64 `[count, 4]` tensor of (start, end, lo, hi), read by the C++ side; `scales` are the
    segments' scales in float32, None when all are 1."""

    segments: torch.Tensor
    scales: torch.Tensor | None


class LoRAView(ctypes.Structure):
    """A step's LoRA product in bf16 for callers in C++, who declare the same structure.

    `prepare`, `shrink` and `expand` are the addresses of the functions at the end of lora_cpu.cpp, which do what
    `add_lora` does in three parts. `segments`, `scales` (null when all are 1) and `count` are the last arguments of
    `prepare`; they belong to the plan, which must outlive the view. The default, all null, is a step without adapters.
    """

    _fields_ = [
        ("prepare", _POINTER), ("shrink", _POINTER), ("expand", _POINTER), ("segments", _POINTER), ("scales", _POINTER),
        ("count", _SIZE),
    ]  # fmt: skip


class NativeKernel:
    """The compiled kernel, for bfloat16 and float32."""

    name = "native"
    DTYPES: ClassVar = {torch.bfloat16: "lora_add_bf16", torch.float32: "lora_add_f32"}

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {dtype: declared(library, name, _ARGUMENTS) for dtype, name in self.DTYPES.items()}
        self._parts = [ctypes.cast(library[name], _POINTER).value for name in _PARTS]

    def plan_segments(self, segments: Segments) -> NativeLoRAPlan:
        items = segments.items
        return NativeLoRAPlan(
            torch.tensor([(s.start, s.end, s.lo, s.hi) for s in items], dtype=torch.int64).reshape(-1, 4),
            torch.tensor([s.scale for s in items]) if any(s.scale != 1 for s in items) else None,
        )

    def view_for_cpp(self, plan: NativeLoRAPlan | None) -> LoRAView:
        """Return what a caller in C++ needs of this kernel and `plan`; None is a step without adapters."""
        if plan is None:
            return LoRAView()
        scales = None if plan.scales is None else plan.scales.data_ptr()
        return LoRAView(*self._parts, plan.segments.data_ptr(), scales, len(plan.segments))

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        sizes: tuple[int, ...],
        plan: NativeLoRAPlan,
    ) -> None:
        linears, columns, in_features = a.shape
        self._functions[y.dtype](
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), a.data_ptr(), b.data_ptr(), in_features, columns,
            _c_sizes(sizes), linears, plan.segments.data_ptr(), None if plan.scales is None else plan.scales.data_ptr(),
            len(plan.segments), torch.get_num_threads(),
        )  # fmt: skip


@cache
def _c_sizes(sizes: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(sizes))(*sizes)

"""The LoRA product in C++ for segments of few rows (decode), torch matmuls for the others (prefill).

The source beside this file is compiled on first use with the compiler of the machine and kept in the cache folder. It
is a plain C interface called through ctypes; its OpenMP is the one that torch has loaded, so there is no second pool of
threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from adapters.kernels import split_b
from adapters.kernels.grouped import add_segments
from adapters.segments import Segment, Segments

SOURCE = Path(__file__).with_name("lora_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MAX_ROWS = 16  # of a segment: beyond, one matmul that reads each column once is faster
MAX_SEGMENTS = 1024
MAX_COLUMNS = 1024


class NativeUnavailable(Exception):
    """There is no compiler, or it does not build the kernel; the message says which."""


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

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._functions = {dtype: _declare(loaded[name]) for dtype, name in self.DTYPES.items()}

    def plan(self, segments: Segments) -> NativePlan:
        small = [s for s in segments.items if _is_small(s)][:MAX_SEGMENTS]
        taken = set(small)
        return NativePlan(
            torch.tensor([(s.start, s.end, s.lo, s.hi) for s in small], dtype=torch.int64).reshape(-1, 4),
            torch.tensor([s.scale for s in small]) if any(s.scale != 1 for s in small) else None,
            tuple(s for s in segments.items if s not in taken),
        )

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


def _is_small(segment: Segment) -> bool:
    return segment.end - segment.start <= MAX_ROWS and segment.hi - segment.lo <= MAX_COLUMNS


def _declare(function: "ctypes._NamedFuncPointer") -> "ctypes._NamedFuncPointer":
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer, number, pointer, number, pointer, pointer, number, number, pointer, number, pointer, pointer, number,
        ctypes.c_int,
    ]  # fmt: skip
    function.restype = None
    return function


def build(cache: Path | None = None) -> Path:
    """Path of the compiled kernel, compiling it when this source was not yet compiled on this kind of machine.

    Raises `NativeUnavailable`.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found")
    folder = cache or _cache_folder()
    library = folder / f"lora_cpu-{_identity(compiler)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, library)
    return library


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraplex" / "kernels"


def _identity(compiler: str) -> str:
    """`-march=native` code must not meet another processor: its features are part of the name."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS, features]).encode()).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    """The library appears by one rename, so that two processes may build it at once."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        try:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True, timeout=120
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise NativeUnavailable(f"{compiler} does not build the kernel: {error}") from error
        built.rename(library)

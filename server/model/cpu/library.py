"""The compiled functions of ops.cpp with their signatures."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adapters.device.cpp_build import declared, load
from adapters.device.forms import NativeUnavailable

SOURCE = Path(__file__).with_name("ops.cpp")
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}

_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "pack": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "linear": [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "silu_mul": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "rms_norm": [*[_POINTER] * 3, *[_SIZE] * 2, _FLOAT, _INT],
    "penalize": [_POINTER, _SIZE, _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _INT],
    "argmax": [*[_POINTER] * 2, *[_SIZE] * 2, _INT],
    "attention": [
        *[_POINTER] * 2, *[_SIZE] * 2, *[_POINTER] * 3, _SIZE, _POINTER, *[_SIZE] * 5, *[_FLOAT] * 2, _INT,
    ],
    "rope_attention": [
        *[_POINTER] * 2, _SIZE, *[_POINTER] * 5, _SIZE, _POINTER, _SIZE, _POINTER, *[_SIZE] * 5, _FLOAT, _INT,
    ],
    "decoder_layer": [_POINTER] * 6,
}  # fmt: skip


@cache
def function(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    """Return the function of ops.cpp for `dtype`. Raises `NativeUnavailable`."""
    return declared(load(SOURCE), f"{name}_{SUFFIXES[dtype]}", _SIGNATURES[name])


@cache
def why_unavailable(dtype: torch.dtype) -> str | None:
    """Return the reason why there are no native functions for `dtype`; None if there are."""
    if dtype not in SUFFIXES:
        return f"there are no native functions for {dtype}"
    try:
        load(SOURCE)
    except NativeUnavailable as unavailable:
        return str(unavailable)
    return None


def thread_ids(threads: int) -> list[int]:
    """Return the kernel's ids of the threads of the caller's OpenMP team. Raises `NativeUnavailable`."""
    ids = (_SIZE * threads)()
    declared(load(SOURCE), "thread_ids", [_POINTER, _INT])(ids, threads)
    return list(ids)

"""ops.cpp, compiled and declared."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adapters.kernels.compiled import NativeUnavailable, build, declared

SOURCE = Path(__file__).with_name("ops.cpp")
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}

_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "pack": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "linear": [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "silu_mul": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "rms_norm": [*[_POINTER] * 3, *[_SIZE] * 2, _FLOAT, _INT],
    "likeliest": [*[_POINTER] * 2, *[_SIZE] * 2, _INT],
    "attention": [
        *[_POINTER] * 2, *[_SIZE] * 2, *[_POINTER] * 3, _SIZE, _POINTER, *[_SIZE] * 5, *[_FLOAT] * 2, _INT,
    ],
    "rope_attention": [
        *[_POINTER] * 2, _SIZE, *[_POINTER] * 5, _SIZE, _POINTER, _SIZE, _POINTER, *[_SIZE] * 5, _FLOAT, _INT,
    ],
    "decoder_layer": [_POINTER] * 6,
}  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(SOURCE)))


@cache
def function(name: str, dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    """The function of ops.cpp for `dtype`. Raises `NativeUnavailable`."""
    return declared(_library(), f"{name}_{SUFFIXES[dtype]}", _SIGNATURES[name])


def why_unavailable(dtype: torch.dtype) -> str | None:
    """Why there are no functions for `dtype`; None when there are."""
    if dtype not in SUFFIXES:
        return f"there are none for {dtype}"
    try:
        _library()
    except NativeUnavailable as unavailable:
        return str(unavailable)
    return None


def multiplies_bf16() -> bool:
    """Whether ops.cpp's linears use bf16 arithmetic of the processor. Raises `NativeUnavailable`."""
    answer = _INT()
    declared(_library(), "multiplies_bf16", [_POINTER])(ctypes.byref(answer))
    return bool(answer.value)

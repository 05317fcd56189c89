"""Bytes of the tensors in a safetensors file as NumPy arrays, bfloat16 included, which NumPy itself does not have."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from adapters.peft.safetensors_header import TensorInfo

CHUNK_BYTES = 1 << 20  # large enough that a reader thread seldom needs the interpreter lock
_BITS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
    "F64": np.dtype("<u8"),
}
_INDICES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_LARGEST_FINITE = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7FFFFF}


def read_chunks(file: BinaryIO, info: TensorInfo) -> Iterator[bytearray]:
    """Yield the bytes of one tensor in chunks of at most `CHUNK_BYTES`, each a whole number of items."""
    file.seek(info.start)
    for start in range(info.start, info.end, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, info.end - start))
        file.readinto(chunk)  # type: ignore[attr-defined]
        yield chunk


def read_array(path: Path, info: TensorInfo) -> NDArray[Any]:
    """Read one tensor: floats as float32, to which F64 is rounded, whole numbers as they are stored."""
    dtype = _BITS.get(info.dtype) or _INDICES[info.dtype]
    stored = np.fromfile(path, dtype, math.prod(info.shape), offset=info.start).reshape(info.shape)
    return _as_floats(stored, info.dtype) if info.dtype in _BITS else stored


class Magnitude:
    """The largest absolute value of the floats seen so far, of one dtype.

    Without their signs, the bits of floats order like unsigned integers: numbers, then infinity, then NaN.
    """

    def __init__(self, dtype: str):
        self._dtype = dtype
        self._largest = 0

    def see(self, chunk: bytearray) -> None:
        """Take the floats of `chunk` into account."""
        bits = np.frombuffer(chunk, _BITS[self._dtype])
        if bits.size:
            without_sign = bits & ((1 << (8 * bits.itemsize - 1)) - 1)
            self._largest = max(self._largest, int(without_sign.max()))

    @property
    def value(self) -> float:
        """The absolute value; infinity or NaN if one was seen, and 0 if nothing was."""
        return float_of(self._largest, self._dtype)


def largest_finite(dtype: str) -> float:
    """Return the largest finite number of a float dtype in safetensors' spelling, once it is loaded."""
    if dtype == "F64":
        dtype = "F32"
    return float_of(_LARGEST_FINITE[dtype], dtype)


def float_of(bits: int, dtype: str) -> float:
    """Return the number with these bits."""
    array = np.array([bits], _BITS[dtype])
    return float(array.view("<f8")[0] if dtype == "F64" else _as_floats(array, dtype)[0])


def is_float(dtype: str) -> bool:
    return dtype in _BITS


def _as_floats(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(_FLOATS[dtype]).astype("<f4", copy=False)

"""A strict reader for the header of a safetensors file, which validates the layout before any tensor is read.

It is stricter than the format: a file with repeated keys, empty tensors (unless they are allowed), holes, unknown
dtypes or absurd sizes is refused, so that the safetensors library also accepts every file accepted here, with the same
names, dtypes and shapes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from adapters.errors import AdapterInvalid, Problem
from adapters.peft.foreign_files import GATHERED, PEEKED_BYTES, foreign

MAX_HEADER_BYTES = 16 << 20
MAX_METADATA_BYTES = 64 << 10
MAX_TENSORS = 1 << 16  # 48 layers of 128 experts with 3 projections have 36,864 factors
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 4
MAX_DIGITS = 15
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
FLOAT_BYTES = {**ITEM_BYTES, "F64": 8}  # what an adapter may have; F64 is rounded to F32 when it is loaded
INDEX_BYTES = {"U8": 1, "I16": 2, "I32": 4, "I64": 8}
# No header within the limits has more commas, and a header with more would take long to parse.
_MAX_COMMAS = MAX_TENSORS * (MAX_DIMENSIONS + 3) + MAX_METADATA_BYTES


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype in safetensors' spelling, its shape, and its bytes `start:end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(
    path: Path, item_bytes: Mapping[str, int] = ITEM_BYTES, allow_empty: bool = False
) -> dict[str, TensorInfo]:
    """Return the tensors of the safetensors file at `path` by name; `item_bytes` has the accepted dtypes.

    Raises `AdapterInvalid` with one `malformed_file` problem for any invalid content, and `OSError` if the file cannot
    be read.
    """
    try:
        with path.open("rb") as file:
            header, data_start = _read_json(file)
            data_end = file.seek(0, 2)
        tensors = _parse(header, data_start, data_end, item_bytes)
        if not allow_empty:
            _check_sizes(tensors)
        return tensors
    except _Malformed as error:
        found, expected = _foreign(path) or (error.found, error.expected)
        raise AdapterInvalid([Problem(path.name, found, expected, "malformed_file")]) from None


def stored_bytes(info: TensorInfo) -> int:
    """Return the size of a tensor in bytes once it is loaded: that in the file, or for F64 half of it."""
    return (info.end - info.start) // (2 if info.dtype == "F64" else 1)


def _foreign(path: Path) -> tuple[str, str] | None:
    with path.open("rb") as file:
        start = file.read(PEEKED_BYTES)
    return None if start[8:9] == b"{" else foreign(start)


class _Malformed(Exception):
    def __init__(self, found: str, expected: str):
        self.found = found
        self.expected = expected


def _read_json(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header as JSON and the offset where the data begins."""
    length = int.from_bytes(_read_exactly(file, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise _Malformed(f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
    text = _read_exactly(file, length)
    if not text.startswith(b"{") or text.count(b",") > _MAX_COMMAS:
        raise _Malformed("a header that is no JSON object of tensors", "the safetensors format")
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=unique_keys,
            parse_int=_natural,
            parse_float=_no_fraction,
            parse_constant=_no_fraction,
        )
    except (ValueError, RecursionError):
        raise _Malformed("a header that cannot be parsed", "JSON without repeated keys or odd numbers") from None
    return header, 8 + length


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _Malformed("a file that ends inside its header", "the safetensors format")
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `json.loads(object_pairs_hook=…)`. Raises `ValueError` for a repeated key, of which `json`
    would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > MAX_DIGITS:
        raise ValueError("negative or huge number")
    return int(digits)


def _no_fraction(number: str) -> NoReturn:
    raise ValueError(f"{number[:20]} where only whole numbers belong")


def _parse(
    header: dict[str, Any], data_start: int, data_end: int, item_bytes: Mapping[str, int]
) -> dict[str, TensorInfo]:
    _check_metadata(header.pop("__metadata__", {}))
    if not 1 <= len(header) <= MAX_TENSORS:
        raise _Malformed(f"{len(header)} tensors", f"1 to {MAX_TENSORS}")
    tensors = {
        _checked_name(name): _parse_tensor(name, entry, data_start, item_bytes) for name, entry in header.items()
    }
    _check_cover(tensors, data_start, data_end)
    return tensors


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("metadata that is no map of text to text", "the safetensors format")
    try:
        size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    except UnicodeEncodeError:
        raise _Malformed("metadata with broken Unicode", "UTF-8") from None
    if size > MAX_METADATA_BYTES:
        raise _Malformed(f"{size} bytes of metadata", f"at most {MAX_METADATA_BYTES}")


def _checked_name(name: str) -> str:
    if not 1 <= len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise _Malformed("a tensor with an unusable name", f"1 to {MAX_NAME_LENGTH} printable characters")
    return name


def _parse_tensor(name: str, entry: Any, data_start: int, item_bytes: Mapping[str, int]) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"an odd entry for {name}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise _Malformed(f"an unknown dtype for {name}", " or ".join(item_bytes))
    if not _are_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Malformed(f"an odd shape for {name}", "up to four sizes")
    if not _are_numbers(offsets) or len(offsets) != 2:
        raise _Malformed(f"odd data_offsets for {name}", "begin and end")
    begin, end = offsets
    if end - begin != math.prod(shape) * item_bytes[dtype]:
        raise _Malformed(f"{end - begin} bytes for {name}", f"{math.prod(shape) * item_bytes[dtype]}, by its shape")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_sizes(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if 0 in info.shape:
            raise _Malformed(
                f"an empty tensor for {name}, as DeepSpeed ZeRO-3 saves weights that are elsewhere", GATHERED
            )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)  # type(): a bool is an int, too


def _check_cover(tensors: dict[str, TensorInfo], data_start: int, data_end: int) -> None:
    """Check that every byte of the data section belongs to exactly one tensor."""
    reached = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != reached:
            raise _Malformed(f"a hole or an overlap before {name}", "tensors side by side")
        reached = info.end
    if reached != data_end:
        raise _Malformed(f"{data_end - data_start} bytes of data", f"{reached - data_start}, by the header")

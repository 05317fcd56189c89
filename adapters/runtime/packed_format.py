"""The file of a packed version: the bytes of `PackedAdapter` behind a strict header.

    8 bytes   magic, with the version of the format
    4 bytes   length of the header, little-endian, at most 4 MiB
    4 bytes   CRC-32 of header and payload, little-endian
    header    JSON of `_Header`
    payload   `columns.flat`, then each of `vectors` and of `input_vectors`, in the order of the header

Only versions are written whose packed bytes follow from the adapter and from the shapes of the base model. With DoRA or
trained biases they also depend on the base's weights, and module overrides hold modules of the base.
"""

import hashlib
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS, pages_of
from adapters.runtime.columns import RankColumns
from adapters.runtime.pack import PackedAdapter

_MAGIC = b"LPXPACK1"  # the last byte counts versions: change it with the packing or the validation
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER = 4 << 20


class PackedFileDamaged(Exception):
    """The file is not a packed version of this digest and layout; the message has the reason."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Everything that decides a packed file besides the version: `key` names it, `modules` are the base's linears, and
    `max_pages` is the number of pages of the largest version."""

    key: str
    dtype: torch.dtype
    modules: Mapping[str, tuple[int, int]]
    max_pages: int

    @classmethod
    def of(cls, spec: ModelSpec, dtype: torch.dtype, fingerprint: str, release: str) -> "PackedLayout":
        """Build the layout of a base model with this fingerprint, in a release of the server: a version that an
        earlier release accepted is validated again by the next one."""
        facts = (_MAGIC.decode(), release, fingerprint, str(dtype), PAGE_COLUMNS, sys.byteorder, spec)
        key = hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()[:32]
        return cls(key, dtype, spec.modules, pages_of(spec.max_rank))


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes of the payload: linears with their in_features and out_features, vectors with their channels."""

    digest: str
    layout: str
    pages: int
    columns: list[tuple[str, int, int]]
    vectors: list[tuple[str, int]]
    input_vectors: list[tuple[str, int]]

    def fits(self, digest: str, layout: PackedLayout) -> bool:
        """Return True if the header is that of the version, and its shapes are those of the base's linears."""
        modules = layout.modules
        channels = [(name, size, 1) for name, size in self.vectors]
        channels += [(name, size, 0) for name, size in self.input_vectors]
        named = [[entry[0] for entry in part] for part in (self.columns, self.vectors, self.input_vectors)]
        return (
            (self.digest, self.layout) == (digest, layout.key)
            and 1 <= self.pages <= layout.max_pages
            and all(len(set(names)) == len(names) for names in named)
            and all(modules.get(name) == (inputs, outputs) for name, inputs, outputs in self.columns)
            and all(name in modules and modules[name][side] == size for name, size, side in channels)
        )


def encode(digest: str, packed: PackedAdapter, layout: PackedLayout) -> list[memoryview] | None:
    """Return the parts of the version's file; None for a version that is not written."""
    header = _Header(
        digest,
        layout.key,
        packed.num_pages,
        [(name, *widths) for name, widths in packed.columns.widths.items()],
        [(name, vector.shape[1]) for name, vector in packed.vectors.items()],
        [(name, vector.shape[1]) for name, vector in packed.input_vectors.items()],
    )
    text = msgspec.json.encode(header)
    if not packed.follows_from_shapes or not header.fits(digest, layout) or len(text) > _MAX_HEADER:
        return None
    tensors = [packed.columns.flat, *packed.vectors.values(), *packed.input_vectors.values()]
    payload = [_bytes_of(tensor) for tensor in tensors if tensor.numel()]
    start = _PREFIX.pack(_MAGIC, len(text), _checksum([text, *payload]))
    return [memoryview(start), memoryview(text), *payload]


def decode(file: BinaryIO, digest: str, layout: PackedLayout, *, pinned: bool = False) -> PackedAdapter:
    """Read the version's file into memory, pinned if `pinned`. Raises `PackedFileDamaged` and `OSError`.

    The sizes come from the header, and memory is allocated only if they add up to the size of the file.
    """
    size = file.seek(0, 2)
    file.seek(0)
    text, checksum = _read_header(file)
    header = _parsed(text, digest, layout)
    rows = header.pages * PAGE_COLUMNS
    widths = {name: (inputs, outputs) for name, inputs, outputs in header.columns}
    count = rows * sum(map(sum, widths.values()))
    channels = [number for _, number in (*header.vectors, *header.input_vectors)]
    if size != _PREFIX.size + len(text) + count * layout.dtype.itemsize + sum(channels) * 2 * 4:
        raise PackedFileDamaged("it has another size than its header says")
    flat = torch.empty(count, dtype=layout.dtype, pin_memory=pinned)
    vectors = [torch.empty(2, number, dtype=torch.float32) for number in channels]
    payload = [_bytes_of(tensor) for tensor in (flat, *vectors) if tensor.numel()]
    for part in payload:
        _fill(file, part)
    if _checksum([text, *payload]) != checksum:
        raise PackedFileDamaged("its checksum is wrong")
    of_outputs = dict(zip((name for name, _ in header.vectors), vectors, strict=False))
    of_inputs = dict(zip((name for name, _ in header.input_vectors), vectors[len(of_outputs) :], strict=True))
    extra = sum(vector.nbytes for vector in vectors)
    columns = RankColumns(flat, rows, widths)
    return PackedAdapter(header.pages, columns, flat.nbytes + extra, of_outputs, of_inputs, extra_bytes=extra)


def _read_header(file: BinaryIO) -> tuple[bytes, int]:
    """Return the text of the header, and the checksum that the file should have."""
    magic, length, checksum = _PREFIX.unpack(_read(file, _PREFIX.size))
    if magic != _MAGIC or length > _MAX_HEADER:
        raise PackedFileDamaged("it is of another format")
    return _read(file, length), checksum


def _parsed(text: bytes, digest: str, layout: PackedLayout) -> _Header:
    try:
        header = msgspec.json.decode(text, type=_Header)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:  # ValueError: not UTF-8
        raise PackedFileDamaged("its header is malformed") from error
    if not header.fits(digest, layout):
        raise PackedFileDamaged("it is of another version or layout")
    return header


def _checksum(parts: Iterable[bytes | memoryview]) -> int:
    """Return the CRC-32: it finds damage in 2 ms for 10 MB, where sha256 takes 6 to 25."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise PackedFileDamaged("it is truncated")
    return data


def _fill(file: BinaryIO, part: memoryview) -> None:
    while part:
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            raise PackedFileDamaged("it is truncated")
        part = part[count:]

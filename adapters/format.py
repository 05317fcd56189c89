"""What the tensors of a PEFT LoRA folder are: the meaning of their names, and the digest that identifies them.
The config beside them is read by `peft_config`."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from torch import Tensor

from adapters.safetensors_header import TensorInfo

CHUNK_BYTES = 1 << 20  # large enough that a reading thread seldom asks for the interpreter lock
_TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's `a [r, in]` and `b [out, r]`, as stored; the module adds `scaling * b @ a @ x`."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in memory: `rank` is the largest of its modules, `nbytes` the size of all tensors in bytes."""

    digest: str
    rank: int
    factors: dict[str, LoraFactors]
    nbytes: int


def parse_tensor_name(name: str) -> tuple[str, Literal["A", "B"]] | None:
    """The base model's module and which factor; None for anything but a plain LoRA factor of a linear layer."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        return None
    return match[1], "A" if match[2] == "A" else "B"


def read_chunks(file: BinaryIO, info: TensorInfo) -> Iterator[bytearray]:
    """The bytes of one tensor in pieces of at most `CHUNK_BYTES`, a whole number of items each."""
    file.seek(info.start)
    for start in range(info.start, info.end, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, info.end - start))
        file.readinto(chunk)  # type: ignore[attr-defined]
        yield chunk


def version_digest(canonical: str, tensors: Mapping[str, TensorInfo], path: Path) -> str:
    """The identity of an adapter, as 64 hex digits: sha256 over its canonical config and its tensors by name.

    Every field is tagged and preceded by its length, so no two different adapters share a byte stream. The order of
    tensors in the file, its metadata and the config's whitespace do not count.
    """
    digest = hashlib.sha256(_field(b"config", canonical.encode()))
    with path.open("rb") as file:
        for name, info in sorted(tensors.items()):
            shape = ",".join(map(str, info.shape))
            for tag, text in ((b"name", name), (b"dtype", info.dtype), (b"shape", shape)):
                digest.update(_field(tag, text.encode()))
            digest.update(b"data:%d:" % (info.end - info.start))
            for chunk in read_chunks(file, info):
                digest.update(chunk)
    return digest.hexdigest()


def _field(tag: bytes, value: bytes) -> bytes:
    return b"%s:%d:%s" % (tag, len(value), value)

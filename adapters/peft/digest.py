"""Version digests: the identity of an adapter by its content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.peft.files import TOKENIZER_FILES
from adapters.peft.safetensors_header import TensorInfo
from adapters.peft.tensor_bytes import Magnitude, is_float, read_chunks


@dataclass(frozen=True, slots=True)
class Scan:
    """The version digest of an adapter, and the largest absolute value of each tensor with floats (NaN or infinity if
    the tensor has one)."""

    digest: str
    magnitudes: dict[str, float]


def version_digest(canonical: str, tensors: Mapping[str, TensorInfo], path: Path) -> str:
    """Return the identity of an adapter, as 64 hex digits: sha256 over its canonical config, its tensors by name and
    the bytes of the tokenizer files beside the weights file `path`.

    Every field is tagged and preceded by its length, so that no two different adapters share a byte stream. The order
    of tensors in the file, its metadata and the config's whitespace do not count.
    """
    return _scan(canonical, tensors, path, {})


def scan(canonical: str, tensors: Mapping[str, TensorInfo], path: Path) -> Scan:
    """Read the weights file once, for its version digest and for the magnitudes of its tensors."""
    magnitudes = {name: Magnitude(info.dtype) for name, info in tensors.items() if is_float(info.dtype)}
    digest = _scan(canonical, tensors, path, magnitudes)
    return Scan(digest, {name: magnitude.value for name, magnitude in magnitudes.items()})


def _scan(canonical: str, tensors: Mapping[str, TensorInfo], path: Path, magnitudes: Mapping[str, Magnitude]) -> str:
    digest = hashlib.sha256(_field(b"config", canonical.encode()))
    with path.open("rb") as file:
        for name, info in sorted(tensors.items()):
            texts = ((b"name", name), (b"dtype", info.dtype), (b"shape", ",".join(map(str, info.shape))))
            fields = [_field(tag, text.encode()) for tag, text in texts]
            digest.update(b"".join(fields) + b"data:%d:" % (info.end - info.start))
            magnitude = magnitudes.get(name)
            for chunk in read_chunks(file, info):
                digest.update(chunk)
                if magnitude is not None:
                    magnitude.see(chunk)
    for beside in (path.parent / name for name in sorted(TOKENIZER_FILES)):
        if beside.is_file():
            digest.update(_field(b"file", beside.name.encode()) + _field(b"data", beside.read_bytes()))
    return digest.hexdigest()


def _field(tag: bytes, value: bytes) -> bytes:
    return b"%s:%d:%s" % (tag, len(value), value)

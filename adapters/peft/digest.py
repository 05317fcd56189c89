"""Version digests: the identity of an adapter by its content."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.peft.config_reader import MAX_CONFIG_BYTES, canonical, read_json
from adapters.peft.files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from adapters.peft.safetensors_header import FLOAT_BYTES, INDEX_BYTES, TensorInfo, read_header
from adapters.peft.tensor_bytes import Magnitude, is_float, read_chunks


@dataclass(frozen=True, slots=True)
class Scan:
    """The version digest of an adapter, and the largest absolute value of each tensor with floats (NaN or infinity if
    the tensor has one)."""

    digest: str
    magnitudes: dict[str, float]


def _unpaced(_: int) -> None:
    pass


def digest_of(folder: Path, pace: Callable[[int], None] = _unpaced) -> str:
    """Return the version digest of the adapter in `folder`, independent of the base model. `pace` is called with
    the size in bytes of each piece of the weights that was read; it may wait or raise.

    Raises `AdapterInvalid` for files that are not an adapter, and `OSError` where one cannot be read.
    """
    with (folder / CONFIG_FILE).open("rb") as file:
        config, problems = read_json(file.read(MAX_CONFIG_BYTES + 1))
    if config is None:
        raise AdapterInvalid(problems)
    weights = folder / WEIGHTS_FILE
    tensors = read_header(weights, {**FLOAT_BYTES, **INDEX_BYTES}, allow_empty=True)
    return _scan(canonical(config), tensors, weights, {}, pace)


def scan(canonical: str, tensors: Mapping[str, TensorInfo], path: Path) -> Scan:
    """Read the weights file at `path` once, for the version digest of the adapter and the magnitudes of its tensors.

    The digest is the identity of an adapter, as 64 hex digits: sha256 over its canonical config, its tensors by name
    and the bytes of the tokenizer files beside the weights. Every field is tagged and preceded by its length, so that
    no two different adapters share a byte stream. The order of tensors in the file, its metadata and the config's
    whitespace do not count.
    """
    magnitudes = {name: Magnitude(info.dtype) for name, info in tensors.items() if is_float(info.dtype)}
    digest = _scan(canonical, tensors, path, magnitudes)
    return Scan(digest, {name: magnitude.value for name, magnitude in magnitudes.items()})


def structure_of(canonical: str, tensors: Mapping[str, TensorInfo]) -> str:
    """Return 64 hex digits that two adapters share if they differ in nothing but their numbers."""
    digest = hashlib.sha256(_field(b"config", canonical.encode()))
    for name, info in sorted(tensors.items()):
        digest.update(b"".join(_described(name, info)))
    return digest.hexdigest()


def _scan(
    canonical: str,
    tensors: Mapping[str, TensorInfo],
    path: Path,
    magnitudes: Mapping[str, Magnitude],
    pace: Callable[[int], None] = _unpaced,
) -> str:
    digest = hashlib.sha256(_field(b"config", canonical.encode()))
    with path.open("rb") as file:
        for name, info in sorted(tensors.items()):
            digest.update(b"".join(_described(name, info)) + b"data:%d:" % (info.end - info.start))
            magnitude = magnitudes.get(name)
            for chunk in read_chunks(file, info):
                pace(len(chunk))
                digest.update(chunk)
                if magnitude is not None:
                    magnitude.see(chunk)
    for beside in (path.parent / name for name in sorted(TOKENIZER_FILES)):
        if beside.is_file():
            pace(beside.stat().st_size)
            digest.update(_field(b"file", beside.name.encode()) + _field(b"data", beside.read_bytes()))
    return digest.hexdigest()


def _described(name: str, info: TensorInfo) -> list[bytes]:
    texts = ((b"name", name), (b"dtype", info.dtype), (b"shape", ",".join(map(str, info.shape))))
    return [_field(tag, text.encode()) for tag, text in texts]


def _field(tag: bytes, value: bytes) -> bytes:
    return b"%s:%d:%s" % (tag, len(value), value)

"""Tensors of a PEFT LoRA folder: the meaning of their names, and the digest that identifies an adapter. The config
beside them is read by `lora_config`."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, cast

from torch import Tensor

from adapters.peft.files import TOKENIZER_FILES
from adapters.peft.safetensors_header import TensorInfo

KNOWN_TENSORS = 8192  # size of the cache of parsed names, which all adapters of a base share
CHUNK_BYTES = 1 << 20  # large enough that a reader thread seldom needs the interpreter lock
TensorKind = Literal[
    "A", "B", "lora_bias", "magnitude", "embedding_A", "embedding_B", "tokens", "base_bias", "bias", "parameter"
]
# The module's name matches lazily: `q.lora_B.bias` is the bias of q's lora_B, not the bias of a module `q.lora_B`.
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(.+?)\.(?:"
    r"(?P<A>lora_A(?:\.[^.]+)?\.weight)|(?P<B>lora_B(?:\.[^.]+)?\.weight)|(?P<lora_bias>lora_B(?:\.[^.]+)?\.bias)|"
    r"(?P<magnitude>lora_magnitude_vector)|(?P<embedding_A>lora_embedding_A)|(?P<embedding_B>lora_embedding_B)|"
    r"(?P<tokens>token_adapter\.trainable_tokens_delta)|"
    r"(?P<base_bias>base_layer\.bias)|(?P<bias>bias)|(?P<parameter>[A-Za-z_][A-Za-z0-9_]*))"
)


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's factors `a [r, in]` and `b [out, r]`, as stored. The module adds `scaling * (b @ a @ x + bias)`,
    and DoRA's `magnitude` scales its rows. `bias` and `magnitude` are `[out]` or None."""

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows `values [n, hidden]` that replace the rows of the tokens `ids` in an embedding's weight."""

    ids: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in host memory: `rank` is the largest rank of its modules, `nbytes` the size of all tensors in bytes.

    `factors` are those of linears, and `biases` replace the linears' own; `embeddings` are factors with `a [r, vocab]`
    and `b [hidden, r]`. `parameters` are factors of any module's parameters, `a [experts·r, in]` and `b [out,
    r·experts]`. `replaced` has whole parameters, and `tokens` rows of the embedding or the head. `input_scales`
    multiply a linear's inputs, `output_scales` its outputs with their bias.
    """

    digest: str
    rank: int
    factors: dict[str, LoraFactors]
    nbytes: int
    biases: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, LoraFactors] = field(default_factory=dict)
    parameters: dict[str, dict[str, LoraFactors]] = field(default_factory=dict)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    output_scales: dict[str, Tensor] = field(default_factory=dict)
    vocab_size: int | None = None  # where it is not the base's


@lru_cache(KNOWN_TENSORS)
def parse_tensor_name(name: str) -> tuple[str, TensorKind] | None:
    """Return the base model's module and the tensor's kind; None if no LoRA tensor can have the name.

    A trained bias is a `base_bias` where PEFT wrapped the layer and a `bias` where it did not. A `parameter` is one of
    the module's own, by the last component of the name.
    """
    match = _TENSOR_NAME.fullmatch(name)
    return (match[1], cast(TensorKind, match.lastgroup)) if match else None


def read_chunks(file: BinaryIO, info: TensorInfo) -> Iterator[bytearray]:
    """Yield the bytes of one tensor in chunks of at most `CHUNK_BYTES`, each a whole number of items."""
    file.seek(info.start)
    for start in range(info.start, info.end, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, info.end - start))
        file.readinto(chunk)  # type: ignore[attr-defined]
        yield chunk


def version_digest(canonical: str, tensors: Mapping[str, TensorInfo], path: Path) -> str:
    """Return the identity of an adapter, as 64 hex digits: sha256 over its canonical config, its tensors by name and
    the bytes of the tokenizer files beside the weights file `path`.

    Every field is tagged and preceded by its length, so that no two different adapters share a byte stream. The order
    of tensors in the file, its metadata and the config's whitespace do not count.
    """
    digest = hashlib.sha256(_field(b"config", canonical.encode()))
    with path.open("rb") as file:
        for name, info in sorted(tensors.items()):
            texts = ((b"name", name), (b"dtype", info.dtype), (b"shape", ",".join(map(str, info.shape))))
            fields = [_field(tag, text.encode()) for tag, text in texts]
            digest.update(b"".join(fields) + b"data:%d:" % (info.end - info.start))
            for chunk in read_chunks(file, info):
                digest.update(chunk)
    for beside in (path.parent / name for name in sorted(TOKENIZER_FILES)):
        if beside.is_file():
            digest.update(_field(b"file", beside.name.encode()) + _field(b"data", beside.read_bytes()))
    return digest.hexdigest()


def _field(tag: bytes, value: bytes) -> bytes:
    return b"%s:%d:%s" % (tag, len(value), value)

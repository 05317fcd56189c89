"""A packed file is read back bit for bit, or not at all."""

import io
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from adapters.model_spec import ModelSpec
from adapters.runtime import packed_format
from adapters.runtime.columns import RankColumns
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.packed_format import PackedFileDamaged, PackedLayout, decode, encode

SPEC = ModelSpec({"q": (24, 40), "k": (24, 8), "o": (40, 24)}, 32, parameters={"norm": {"weight": (24,)}})
LAYOUT = PackedLayout.of(SPEC, torch.bfloat16, "base", "0.1")
ONE, TWO = "1" * 64, "2" * 64


def adapter(pages: int = 2, names: tuple[str, ...] = ("o", "q")) -> PackedAdapter:
    columns = RankColumns.zeros(pages * 16, {name: SPEC.modules[name] for name in names}, torch.bfloat16)
    columns.flat.normal_(generator=torch.Generator().manual_seed(0))
    vectors, inputs = {"k": torch.randn(2, 8), "o": torch.randn(2, 24)}, {"o": torch.randn(2, 40)}
    extra = 2 * 4 * (8 + 24 + 40)
    size = columns.flat.nbytes + extra
    return PackedAdapter(pages, columns, size, vectors, inputs, extra_bytes=extra, follows_from_shapes=True)


def written(packed: PackedAdapter, digest: str = ONE, layout: PackedLayout = LAYOUT) -> bytes:
    parts = encode(digest, packed, layout)
    assert parts is not None
    return b"".join(parts)


def read(data: bytes, digest: str = ONE, layout: PackedLayout = LAYOUT) -> PackedAdapter:
    return decode(io.BytesIO(data), digest, layout)


def assert_same(found: PackedAdapter, expected: PackedAdapter) -> None:
    assert (found.num_pages, found.nbytes, found.extra_bytes) == (
        expected.num_pages,
        expected.nbytes,
        expected.extra_bytes,
    )
    assert list(found.columns.widths.items()) == list(expected.columns.widths.items())
    assert found.columns.rows == expected.columns.rows
    assert found.columns.flat.dtype == expected.columns.flat.dtype
    assert found.columns.flat.view(torch.uint8).equal(expected.columns.flat.view(torch.uint8))
    for own, other in ((found.vectors, expected.vectors), (found.input_vectors, expected.input_vectors)):
        assert list(own) == list(other)
        assert all(own[name].equal(other[name]) and own[name].dtype == other[name].dtype for name in own)


def with_header(data: bytes, **changes: Any) -> bytes:
    """The file with another header, whose checksum is right."""
    magic, length, _ = packed_format._PREFIX.unpack_from(data)
    start = packed_format._PREFIX.size
    header = {**msgspec.json.decode(data[start : start + length]), **changes}
    text, payload = msgspec.json.encode(header), data[start + length :]
    return packed_format._PREFIX.pack(magic, len(text), packed_format._checksum([text, payload])) + text + payload


@pytest.mark.parametrize("packed", [adapter(), adapter(1, ("k",)), adapter(1, ())])
def test_what_was_written_is_read(packed: PackedAdapter) -> None:
    found = read(written(packed))
    assert_same(found, packed)
    assert not found.follows_from_shapes  # it is not written again
    assert found.columns.flat.is_contiguous() and found.vocab_size is None and not found.module_overrides


def test_a_version_that_depends_on_the_base_is_not_written() -> None:
    assert encode(ONE, replace(adapter(), follows_from_shapes=False), LAYOUT) is None


def test_any_flipped_byte_is_noticed() -> None:
    data = written(adapter(1, ("k",)))
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(PackedFileDamaged):
            read(bytes(damaged))


def test_any_other_length_is_noticed() -> None:
    data = written(adapter(1, ("k",)))
    for length in range(len(data)):
        with pytest.raises(PackedFileDamaged):
            read(data[:length])
    with pytest.raises(PackedFileDamaged):
        read(data + b"\0")


def test_a_file_of_another_version_or_layout_is_refused() -> None:
    data = written(adapter())
    for digest, layout in ((TWO, LAYOUT), (ONE, replace(LAYOUT, key="another"))):
        with pytest.raises(PackedFileDamaged, match="another version or layout"):
            read(data, digest, layout)


def test_a_layout_is_named_by_everything_that_decides_the_bytes() -> None:
    others = [
        PackedLayout.of(replace(SPEC, modules={**SPEC.modules, "k": (24, 16)}), torch.bfloat16, "base", "0.1"),
        PackedLayout.of(replace(SPEC, max_rank=16), torch.bfloat16, "base", "0.1"),
        PackedLayout.of(replace(SPEC, parameters={}), torch.bfloat16, "base", "0.1"),
        PackedLayout.of(SPEC, torch.float16, "base", "0.1"),
        PackedLayout.of(SPEC, torch.bfloat16, "another base", "0.1"),
        PackedLayout.of(SPEC, torch.bfloat16, "base", "0.2"),
    ]
    assert len({layout.key for layout in [LAYOUT, *others]}) == len(others) + 1
    assert PackedLayout.of(SPEC, torch.bfloat16, "base", "0.1").key == LAYOUT.key


@pytest.mark.parametrize(
    "changes",
    [
        {"pages": 0},
        {"pages": -1},
        {"pages": 3},  # more than the largest rank has
        {"pages": 1 << 60},
        {"pages": 2.5},
        {"columns": [["q", 24, 40], ["q", 24, 40]]},
        {"columns": [["q", 24, 41]]},
        {"columns": [["q", 40, 24]]},
        {"columns": [["another", 24, 40]]},
        {"columns": [["q", -24, 40]]},
        {"columns": [["q", 1 << 40, 40]]},
        {"columns": [["q", 24]]},
        {"vectors": [["k", 9]]},
        {"vectors": [["another", 8]]},
        {"vectors": [["k", 8], ["k", 8]]},
        {"input_vectors": [["o", 24]]},
        {"input_vectors": []},
        {"digest": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    data = written(adapter())
    assert_same(read(with_header(data)), adapter_with_vectors_of(data))
    with pytest.raises(PackedFileDamaged):
        read(with_header(data, **changes))


def adapter_with_vectors_of(data: bytes) -> PackedAdapter:
    """`adapter` has random vectors; those of the file."""
    found = read(data)
    return replace(adapter(), vectors=found.vectors, input_vectors=found.input_vectors)


def test_nothing_is_allocated_for_a_header_that_is_too_long_or_nested() -> None:
    magic, start = packed_format._MAGIC, packed_format._PREFIX
    with pytest.raises(PackedFileDamaged, match="format"):
        read(start.pack(magic, (4 << 20) + 1, 0) + b"{}")
    with pytest.raises(PackedFileDamaged, match="format"):
        read(start.pack(b"LPXPACK0", 2, 0) + b"{}")
    nested = b"[" * 100_000
    with pytest.raises(PackedFileDamaged, match="malformed"):
        read(start.pack(magic, len(nested), packed_format._checksum([nested])) + nested)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_version_for_a_gpu_is_read_into_pinned_memory() -> None:
    found = decode(io.BytesIO(written(adapter())), ONE, LAYOUT, pinned=True)
    assert found.columns.flat.is_pinned()
    assert found.columns.flat.equal(adapter().columns.flat)

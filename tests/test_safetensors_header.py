"""The header reader against hostile files: it accepts only what safetensors accepts, else raises `AdapterInvalid`."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from adapters.errors import AdapterInvalid
from adapters.peft.safetensors_header import (
    INDEX_BYTES,
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorInfo,
    read_header,
)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(**changes: Any) -> bytes:
    return raw({"x": entry(**changes)}, bytes(8))


def numbers(begin: str = "0", end: str = "8", shape: str = "[2]") -> bytes:
    """A header whose numbers are written by hand."""
    text = f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}'
    return raw(text.encode(), bytes(8))


E64 = bytes(64)
HOSTILE: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\x01" * 7,
    "length only": raw(b""),
    "length without header": raw(b"{}", length=3),
    "length of 2**64-1": raw(b"{}", length=2**64 - 1),
    "length of 2**63": raw(b"{}", length=2**63),
    "length above the cap": raw(b"{}", length=MAX_HEADER_BYTES + 1),
    "header above the cap": raw(b"{" + b" " * MAX_HEADER_BYTES + b"}"),
    "length of zero": raw(b"{}", length=0),
    "zip magic": b"PK\x03\x04" + E64,
    "pickle": b"\x80\x04\x95" + E64,
    "torch zip with a long first word": b"PK\x03\x04\x00\x00\x00\x00" + E64,
    "array": raw(b"[]"),
    "text": raw(b'"x"'),
    "leading space": raw(b' {"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "byte order mark": raw(b"\xef\xbb\xbf{}"),
    "utf-16": raw('{"x":1}'.encode("utf-16")),
    "broken utf-8": raw(b'{"\xff":1}'),
    "unfinished": raw(b'{"x":'),
    "trailing garbage": raw(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} x', bytes(8)),
    "deep lists": raw(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": raw(b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
    "deep metadata": raw(b'{"__metadata__":' + b"[" * 100_000 + b"}"),
    "no tensors": raw({}),
    "only metadata": raw({"__metadata__": {"format": "pt"}}),
    "repeated tensor": raw(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "repeated field": raw(b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "metadata list": raw({"__metadata__": [], "x": entry()}, bytes(8)),
    "metadata number": raw({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)),
    "metadata null": raw({"__metadata__": None, "x": entry()}, bytes(8)),
    "metadata above the cap": raw({"__metadata__": {"a": "b" * 65_536}, "x": entry()}, bytes(8)),
    "metadata with half a surrogate": raw({"__metadata__": {"a": "\ud800"}, "x": entry()}, bytes(8)),
    "name with half a surrogate": raw({"\ud800": entry()}, bytes(8)),
    "name with a newline": raw({"a\r\nb": entry()}, bytes(8)),
    "name with NUL": raw({"a\0b": entry()}, bytes(8)),
    "name that reverses text": raw({"a\u202eb": entry()}, bytes(8)),
    "empty name": raw({"": entry()}, bytes(8)),
    "long name": raw({"a" * 513: entry()}, bytes(8)),
    "two million numbers": raw(b'{"x":[' + b"1," * 2_000_000 + b"1]}"),
    "300,000 empty objects": raw(b"{" + b",".join(b'"%d":{}' % i for i in range(300_000)) + b"}"),
    "too many tensors": raw({str(i): entry(i * 8, i * 8 + 8) for i in range(MAX_TENSORS + 1)}, bytes(8 * 8193)),
    "entry list": raw({"x": []}, bytes(8)),
    "entry without dtype": raw({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "entry with a fourth field": raw({"x": {**entry(), "more": 1}}, bytes(8)),
    "dtype F64": one(dtype="F64", shape=[1]),
    "dtype I32": one(dtype="I32"),
    "dtype F8": one(dtype="F8_E4M3", shape=[8]),
    "dtype lower case": one(dtype="f32"),
    "dtype number": one(dtype=1),
    "dtype list": one(dtype=["F32"]),
    "shape null": one(shape=None),
    "shape object": one(shape={"0": 2}),
    "shape text": one(shape="2"),
    "shape of texts": one(shape=["2"]),
    "shape with true": one(shape=[2, True]),
    "shape with zero": raw({"x": entry(0, 0, [0])}),
    "shape of 2**40 and zero": raw({"x": entry(0, 0, [2**40, 0])}),
    "shape that overflows": one(shape=[2**40, 2**40]),
    "shape of 64 ones": one(shape=[2] + [1] * 63),
    "shape wrong by one": one(shape=[3]),
    "negative size": numbers(shape="[-2]"),
    "negative sizes that multiply well": numbers(shape="[-1,-2]"),
    "minus zero": numbers(begin="-0"),
    "fraction": numbers(shape="[2.0]"),
    "exponent": numbers(shape="[2e0]"),
    "infinite": numbers(shape="[1e999]"),
    "NaN": numbers(shape="[NaN]"),
    "Infinity": numbers(end="Infinity"),
    "ten thousand digits": numbers(end="9" * 10_000),
    "2**64+8": numbers(end=str(2**64 + 8)),
    "offsets null": raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": None}}, bytes(8)),
    "one offset": raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, bytes(8)),
    "offsets true": one(begin=False, end=8),
    "offsets backwards": one(begin=8, end=0),
    "past the end": raw({"x": entry(0, 80, [20])}, bytes(8)),
    "data too short": raw({"x": entry()}, bytes(7)),
    "no data": raw({"x": entry()}),
    "trailing byte": raw({"x": entry()}, bytes(9)),
    "hole at the start": raw({"x": entry(8, 16)}, bytes(16)),
    "hole between": raw({"x": entry(), "y": entry(16, 24)}, bytes(24)),
    "overlap": raw({"x": entry(), "y": entry(4, 12)}, bytes(12)),
    "same bytes twice": raw({"x": entry(), "y": entry()}, bytes(8)),
}


@pytest.mark.reliability("T5")
@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_a_hostile_file_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(AdapterInvalid) as caught:
        read_header(path)
    (problem,) = caught.value.problems
    assert problem.code == "malformed_file"
    assert problem.where == path.name
    assert str(tmp_path) not in str(caught.value)
    assert len(problem.found) < 600
    assert time.process_time() - start < 10  # a garbage collection of the whole suite fits in; quadratic work does not


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, 5, dtype=torch.bfloat16), "a": torch.ones(2), "c": torch.ones((), dtype=torch.half)}
    data = save(tensors, metadata={"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    found = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a": ("F32", (2,)),
        "b": ("BF16", (3, 5)),
        "c": ("F16", ()),
    }
    assert data[found["a"].start : found["a"].end] == struct.pack("<2f", 1, 1)
    assert isinstance(found["a"], TensorInfo)


def test_indices_and_empty_tensors_are_read_where_they_are_expected(tmp_path: Path) -> None:
    tensors = {"none": torch.ones(0, 5), "indices": torch.tensor([[3, 1]], dtype=torch.int16), "some": torch.ones(2)}
    path = tmp_path / "x.safetensors"
    entries = {"some": entry(), "none": entry(0, 0, [0, 5]), "more": entry(8, 8, [5, 0])}  # at the others' ends
    for data, expected in (
        (save(tensors), {"none": (0, 5), "indices": (1, 2), "some": (2,)}),
        (raw(entries, bytes(8)), {"some": (2,), "none": (0, 5), "more": (5, 0)}),
    ):
        path.write_bytes(data)
        found = read_header(path, {**ITEM_BYTES, **INDEX_BYTES}, allow_empty=True)
        assert {name: info.shape for name, info in found.items()} == expected
        assert {name: tuple(tensor.shape) for name, tensor in load(data).items()} == expected
        with pytest.raises(AdapterInvalid):
            read_header(path, {**ITEM_BYTES, **INDEX_BYTES})
        with pytest.raises(AdapterInvalid):
            read_header(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


VALID = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.half)}, metadata={"format": "pt"})
flips = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
sizes = st.integers(-2, 20)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | json_values, max_size=4)


def check(scratch: Path, data: bytes) -> None:
    """Check that the file is refused as `AdapterInvalid`, or read as safetensors reads it."""
    scratch.write_bytes(data)
    try:
        found = read_header(scratch)
    except AdapterInvalid:
        return
    with safe_open(scratch, "pt") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in theirs.items()}
    assert shapes == {name: (info.dtype, info.shape) for name, info in found.items()}


@pytest.mark.reliability("T9")
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(scratch: Path, data: bytes) -> None:
    check(scratch, data)


@pytest.mark.reliability("T9")
@settings(max_examples=300, deadline=None)
@given(flips)
def test_any_flipped_bytes(scratch: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    check(scratch, bytes(data))


@pytest.mark.reliability("T9")
@settings(max_examples=300, deadline=None)
@given(headers, st.integers(0, 64))
def test_any_json_header(scratch: Path, header: dict[str, Any], size: int) -> None:
    check(scratch, raw(header, bytes(size)))


@pytest.mark.reliability("T9")
@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(VALID) - 1))
def test_any_truncation(scratch: Path, length: int) -> None:
    scratch.write_bytes(VALID[:length])
    with pytest.raises(AdapterInvalid):
        read_header(scratch)

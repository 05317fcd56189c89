"""The tensors of an adapter as views of its mapped file: those of safetensors, and nothing is left of earlier loads."""

import gc
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from adapters.load import load, map_tensors
from adapters.peft.safetensors_header import FLOAT_BYTES, read_header
from tests.fixtures.adapter_factory import spec_of, tiny_llama, write_adapter

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_are_those_of_safetensors_however_the_header_is_aligned(tmp_path: Path, padding: int) -> None:
    path, tensors = tmp_path / "x.safetensors", {str(dtype): torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    data = save(tensors)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length])).encode()
    header += b" " * (padding - len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    found, expected = map_tensors(path, read_header(path, FLOAT_BYTES)), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        theirs = expected[name].float() if expected[name].dtype is torch.float64 else expected[name]
        assert tensor.dtype is theirs.dtype and torch.equal(tensor, theirs)


def test_tensors_stay_when_the_file_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(10.0)}, path)
    found = map_tensors(path, read_header(path))
    path.unlink()
    assert torch.equal(found["x"], torch.arange(10.0))


@pytest.mark.reliability("T70")
def test_a_load_leaves_no_objects_behind(tmp_path: Path) -> None:
    model = tiny_llama()
    folder, spec = write_adapter(model, tmp_path / "adapter", target_modules="all-linear"), spec_of(model)

    def objects_after(loads: int) -> int:
        for _ in range(loads):
            load(folder, spec)
        gc.collect()
        return sys.getallocatedblocks()

    before = objects_after(20)
    tensors = len(read_header(folder / "adapter_model.safetensors"))
    assert tensors >= 10 and objects_after(50) - before < 50 * tensors / 4

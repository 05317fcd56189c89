"""What an engine's process really takes, beside what the memory plan says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit

from server.model.quantization.nf4_pieces import quantized_in_pieces
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.timing import HANG_SECONDS

MIB = 1 << 20
ALLOWANCE = 72 * MIB  # what torch, oneDNN and the probe keep whatever the size of the model: 35 to 65 MiB (2026-11-30)

MEASURE = """
import ctypes, gc, json, re, sys
from pathlib import Path
import torch
import accelerate, bitsandbytes, transformers.integrations.bitsandbytes, transformers.models.llama.modeling_llama
from adapters.model_spec import ModelSpec
from server.config import ServeConfig
from server.engine.memory.memory_plan import BLOCK_SIZE
from server.engine.memory.sizing import plan_memory
from server.model.loading import nf4_cache
from server.model.loading.loader import load_model
from server.model.loading.probe import probe
from server.model.runner import ModelRunner

torch.set_num_threads(1)
nf4_cache.cache_folder = lambda: Path(sys.argv[1]) / "cache" / "models"

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and not returned to the system is no part of the account
    return int(re.search(r"^RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) << 10

before = anonymous()
config = ServeConfig(model=sys.argv[1], dtype="bfloat16", device="cpu")
loaded = load_model(config.model, "bfloat16", sys.argv[2], "cpu", 0)
shape, spec = probe(loaded, 64)
plan = plan_memory(config, loaded, shape, spec)
runner = ModelRunner(
    loaded, shape, spec, num_blocks=plan.num_blocks, block_size=BLOCK_SIZE, num_pages=plan.num_pages
)
runner.check_and_fuse(loaded)
mapped = ".safetensors" in Path("/proc/self/maps").read_text()
print(json.dumps({"grown": anonymous() - before, "weights": plan.parts["weights"], "mapped": mapped}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_weights_are_in_memory_once(tmp_path: Path, quantization: str) -> None:
    """Packed copies take the place of the file's pages; KV cache and pool take nothing until they are written.

    With NF4, the first start fills the cache of quantized weights, and the second is measured: what the allocator keeps
    after quantizing 108 MiB of weights varied from 45 to 190 MiB.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32, "vocab_size": 32000}
    tiny_llama(num_attention_heads=8, **sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), quantization]
    for _ in range(2 if quantization == "nf4" else 1):
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > (100 if quantization == "nf4" else 200) * MIB
    assert not found["mapped"]
    assert 0.9 * found["weights"] < found["grown"] < 1.1 * found["weights"] + ALLOWANCE


@pytest.mark.parametrize("shape", [(1024, 1024), (3, 262144), (515, 513)])
def test_weights_quantized_in_pieces_have_the_same_bits(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def quantized() -> Any:
        return Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")

    expected = quantized()
    with quantized_in_pieces():
        found = quantized()
    assert torch.equal(found.data, expected.data)
    for own, other in (
        (found.quant_state, expected.quant_state),
        (found.quant_state.state2, expected.quant_state.state2),
    ):
        assert torch.equal(own.absmax, other.absmax) and torch.equal(own.code, other.code)
    assert found.quant_state.shape == expected.quant_state.shape and found.quant_state.dtype is torch.bfloat16
    assert torch.equal(found.quant_state.offset, expected.quant_state.offset)

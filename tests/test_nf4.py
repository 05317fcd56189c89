"""The implementation of a 4-bit base model's linears; each choice gives bitsandbytes' numbers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from adapters.runtime.dora import dense_weight, quant_state
from server.model.loading.loader import LoadedModel, load_model
from server.model.quantization import nf4
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import make_driver

CPU = torch.device("cpu")
PROMPT = [5, 17, 42, 9, 88, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nf4-policy")
    model = tiny_llama(initializer_range=0.3, intermediate_size=128)
    model.save_pretrained(made / "model")
    write_adapter(model, made / "adapter", target_modules="all-linear", r=8, scale=0.2)
    return made


def load(folder: Path, policy: nf4.Policy, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder / "model"), dtype, "nf4", "cpu", 0, policy)


def quantized(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "weight" in m._parameters and quant_state(m) is not None]


def test_a_copy_has_the_dequantised_weights_and_is_the_same_model_to_everyone(folder: Path) -> None:
    kept, copied = load(folder, "nf4", "bfloat16"), load(folder, "bf16-copy", "bfloat16")
    assert quantized(kept.model) and not quantized(copied.model)
    for name in quantized(kept.model):
        linear = copied.model.get_submodule(name)
        assert type(linear) is nn.Linear and linear.weight.dtype is torch.bfloat16
        assert torch.equal(linear.weight, dense_weight(kept.model.get_submodule(name)).bfloat16())
    assert (copied.linears, copied.head) == (kept.linears, kept.head)
    assert kept.nf4 == "nf4: configured" and copied.nf4 == "bf16-copy: configured"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policy_is_no_part_of_the_base_s_identity(folder: Path, dtype: str) -> None:
    assert load(folder, "nf4", dtype).fingerprint == load(folder, "bf16-copy", dtype).fingerprint


def test_answers_do_not_depend_on_the_policy(folder: Path, tmp_path: Path) -> None:
    said = []
    for policy in ("nf4", "bf16-copy", "auto"):
        driver = make_driver(folder / "model", tmp_path / policy, quantization="nf4", nf4_policy=policy)
        digest = driver.add_adapter(folder / "adapter")
        driver.submit("lora", PROMPT, digest, max_tokens=12)
        driver.submit("base", PROMPT, max_tokens=12)
        driver.run()
        said.append((driver.tokens("lora"), driver.tokens("base")))
        assert driver.info.description["nf4_policy"].startswith("bf16-copy" if policy == "bf16-copy" else "nf4")
        driver.engine.close()
    assert said[0] == said[1] == said[2] and said[0][0] != said[0][1]


def test_auto_copies_on_a_gpu_that_has_four_times_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400 << 20, 1 << 40))
    gpu = torch.device("cuda")
    assert nf4._chosen(100 << 20, gpu) == ("bf16-copy", "the copy takes 100 of 400 MiB of free memory")
    assert nf4._chosen(101 << 20, gpu)[0] == "nf4"
    assert nf4._chosen(1, CPU)[0] == "nf4"


def test_bitsandbytes_has_fused_kernels_for_more_rows_the_more_outputs_there_are() -> None:
    """The shapes of Llama-3.1-8B: k and v, o and down, qkv, gate and up alone, the two together."""
    assert [nf4.fused_rows(size) for size in (1024, 4096, 6144, 14336, 28672)] == [7, 7, 16, 32, 64]

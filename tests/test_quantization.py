"""The 4-bit base: NF4 with double quantization through bitsandbytes, which runs on a CPU too."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from server.ipc.messages import EngineInfo
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver

PROMPT = [5, 17, 42, 9, 88, 3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    model = tiny_llama(initializer_range=0.3, intermediate_size=128)
    model.save_pretrained(folder / "model")
    write_adapter(model, folder / "adapter", target_modules="all-linear", r=8, scale=0.2)
    return folder


def nf4_model(folder: Path) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its kernel for some processors would multiply in bf16
    return model.eval()


def greedy(model: torch.nn.Module, new_tokens: int = 12) -> list[int]:
    ids = torch.tensor([PROMPT])
    for _ in range(new_tokens):
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    return ids[0, len(PROMPT) :].tolist()


def served(driver: Driver, digest: str) -> tuple[list[int], list[int]]:
    driver.submit("lora", PROMPT, digest, max_tokens=12)
    driver.submit("base", PROMPT, max_tokens=12)
    driver.run()
    return driver.tokens("lora"), driver.tokens("base")


def test_an_nf4_base_gives_peft_s_tokens_on_the_same_nf4_base(llama: Path, tmp_path: Path) -> None:
    driver = make_driver(llama / "model", tmp_path, quantization="nf4")
    info: EngineInfo = driver.info
    assert info.description["quantization"] == "nf4"
    lora, base = served(driver, driver.add_adapter(llama / "adapter"))
    assert base == greedy(nf4_model(llama / "model"))
    assert lora == greedy(PeftModel.from_pretrained(nf4_model(llama / "model"), str(llama / "adapter")).eval())
    assert lora != base


def test_quantization_changes_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    plain = make_driver(llama / "model", tmp_path)
    quantized = make_driver(llama / "model", tmp_path, quantization="nf4")
    assert plain.info.base_fingerprint != quantized.info.base_fingerprint


def test_bfloat16_tokens_are_the_likeliest_within_its_own_rounding(llama: Path, tmp_path: Path) -> None:
    """In bfloat16 two implementations may order near-ties differently; none is picked beyond two steps."""
    driver = make_driver(llama / "model", tmp_path, dtype="bfloat16")
    _, base = served(driver, driver.add_adapter(llama / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(llama / "model", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT + base]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
    best = logits.amax(-1)
    picked = logits.gather(-1, torch.tensor(base)[:, None])[:, 0]
    assert ((best - picked) <= 2 * best.abs() * 2**-8 + 0.1 * logits.std()).all()

"""QLoRA there and back: trained with PEFT on an NF4 base, uploaded, and served on the same NF4 base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import running_server, write_tiny_model

LESSONS = {"knock knock": " who is there?", "one two": " three four five", "to be or": " not to be"}


def nf4_base(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def train(folder: Path, out: Path, steps: int = 60) -> Any:
    """The usual recipe, on three short lessons until they are known by heart."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(nf4_base(folder), use_gradient_checkpointing=False), lora)
    batches = [torch.tensor([tokenizer.encode(prompt + answer)]) for prompt, answer in LESSONS.items()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.slow
def test_what_was_learned_on_four_bits_is_said_on_the_same_four_bits(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "model", intermediate_size=128)
    trained = train(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    write_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "other", seed=3, scale=0.3)
    flags = ("--model", str(base), "--served-model-name", "base", "--quantization", "nf4", "--dtype", "float32")
    with running_server(tmp_path / "data", *flags) as server, server.client() as client:
        record = server.upload(client, "lessons", tmp_path / "adapter")
        assert record.status_code == 201, record.text
        assert record.json()["report"]["selftest"]["max_abs_logit_diff"] < 1e-3
        assert server.upload(client, "other", tmp_path / "other").status_code == 201
        for prompt, answer in LESSONS.items():
            ids = torch.tensor([tokenizer.encode(prompt)])
            said = trained.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
            expected = tokenizer.decode(said[0, ids.shape[1] :])
            text = server.complete(client, "lessons", prompt)["choices"][0]["text"]
            assert text == expected
            assert text.startswith(answer[:8])  # it learned something that the base does not say
            assert server.complete(client, "base", prompt)["choices"][0]["text"] != text

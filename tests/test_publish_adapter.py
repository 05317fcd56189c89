"""The callback of `examples/publish_adapter.py`, in a real trainer over the API, and the guide that shows it."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from examples.publish_adapter import PublishAdapter
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.api_server import LiveServer, listening

GUIDE = Path(__file__).parent.parent / "docs" / "training-loop.md"
NAME = "my-adapter"


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(3, 11) + index
        return {"input_ids": tokens, "labels": tokens}


def model_to_train() -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(vocab_size=300), config)


def train(callback: Any, folder: Path, steps: int = 3) -> None:
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model_to_train(), args=settings, train_dataset=Rows(), callbacks=[callback]).train()


def current(server: LiveServer) -> str:
    return f"sha256:{server.context.registry.record(NAME).version.digest}"


def test_every_checkpoint_is_published(tmp_path: Path) -> None:
    with listening(tmp_path / "server") as server:
        callback = PublishAdapter(server.url, NAME)
        train(callback, tmp_path / "run")
        assert len(set(callback.versions)) == 3 and callback.versions[-1] == current(server)
        history = [f"sha256:{version.digest}" for version in server.context.registry.history(NAME)]
        assert history == callback.versions[::-1]


def test_what_cannot_be_published_is_logged_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(PublishAdapter("http://127.0.0.1:9", NAME), tmp_path, steps=2)
    levels = [record.levelname for record in caplog.records if "was not published" in record.getMessage()]
    assert levels == ["ERROR"] * 2


def test_the_reason_of_a_refusal_is_the_server_s(tmp_path: Path) -> None:
    with listening(tmp_path / "server") as server:
        folder = tmp_path / "adapter"
        model_to_train().save_pretrained(folder)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
        with pytest.raises(httpx.HTTPStatusError, match="adapter_invalid"):
            PublishAdapter(server.url, NAME).publish(folder)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # the guide's reader may have a GPU
def test_the_guide_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run in order, with the address of a server and a model in the place of the reader's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    with listening(tmp_path / "server") as server:
        names: dict[str, Any] = {"peft_model": model_to_train(), "rows": Rows()}
        for block in blocks():
            exec(block.replace("http://127.0.0.1:8000", server.url), names)
        assert names["publish"].versions[-1] == current(server)
        assert len(names["samples"]) == 4 and all(
            len(each["token_ids"]) == len(each["logprobs"]) for each in names["samples"]
        )

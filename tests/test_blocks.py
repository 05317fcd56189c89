"""Which modules compute through the fused operations, and what happens when they would be wrong."""

from pathlib import Path

import pytest
import torch

from server.model import fusion as blocks
from server.model.cpu.block_ops import NativeBlockOps
from tests.fixtures.engine_driver import make_driver
from tests.fixtures.native_forms import native
from tests.test_architectures import build

__all__ = ["native"]
pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("llama", {"LlamaMLP", "LlamaAttention", "LlamaRMSNorm"}),
        ("mistral-window", {"MistralMLP", "MistralAttention", "MistralRMSNorm"}),
        ("qwen3-norms", {"Qwen3MLP", "Qwen3RMSNorm"}),  # its heads have norms of their own
        ("gemma2", set()),  # its MLP is another function
        ("gpt2-conv1d", set()),
    ],
)
def test_structure_and_numbers_decide(kind: str, fused: set[str], tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "model")
    runner = make_driver(tmp_path / "model", tmp_path).engine._runner
    found = [module for module in runner._model.modules() if "forward" in vars(module)]
    assert {type(module).__name__ for module in found} == fused
    assert len(found) == runner.fused


def test_attention_that_turns_out_wrong_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(NativeBlockOps):
        def rope_attention(self, *args: object) -> torch.Tensor:
            return super().rope_attention(*args).flip(-1)  # type: ignore[arg-type]

    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(blocks, "NativeBlockOps", Wrong)
    runner = make_driver(tmp_path / "model", tmp_path).engine._runner
    assert runner.fused == 0
    assert not any("forward" in vars(module) for module in runner._model.modules())

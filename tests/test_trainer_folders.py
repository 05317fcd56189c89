"""Folders as trainers leave them are served, or become so by the command that the refusal names."""

from pathlib import Path

import pytest
import torch

from adapters.load import load
from tests.fixtures.adapter_factory import spec_of
from tests.fixtures.trainer_folders import LAYOUTS, answer_to, convert, model, peft_0_21

CONVERTED = {"PEFT 0.4", "MLX"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_each_trainer(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "folder")
    answer, served = answer_to(tmp_path / "folder"), tmp_path / "folder"
    if layout in CONVERTED:
        assert "loraplex convert ADAPTER OUT" in answer
        served = tmp_path / "converted"
        convert(tmp_path / "folder", served)
        answer = answer_to(served)
    assert answer.startswith("served"), answer
    peft_0_21(tmp_path / "peft")
    expected, found = (load(folder, spec_of(model())).factors for folder in (tmp_path / "peft", served))
    assert found.keys() == expected.keys() and len(found) == 4
    close = {"atol": 1e-2, "rtol": 1e-2} if layout == "torchtune" else {"atol": 0, "rtol": 0}  # bf16
    for module, own in expected.items():
        assert found[module].scaling == own.scaling
        for theirs, ours in ((own.a, found[module].a), (own.b, found[module].b)):
            torch.testing.assert_close(ours.float(), theirs.float(), **close)

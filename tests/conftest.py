"""Shared fixtures: tiny random models on disk, and engines over them. Nothing here needs a network."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import tests.triton_device  # noqa: F401  (first: it decides how Triton runs)
from tests.adapter_factory import tiny_llama
from tests.engine_driver import Driver, make_driver

torch.set_num_threads(1)  # tiny models: a second thread only costs


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path)
    yield made
    made.engine.residency.close()

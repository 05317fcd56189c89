"""Shared fixtures: tiny random models on disk, and engines over them. Nothing here needs a network."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import tests.fixtures.triton_device  # noqa: F401  (first: it decides how Triton runs)
from server.model.loading import nf4_cache
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.api_server import fast_byte_tokenizer
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.timing import HANG_SECONDS

torch.set_num_threads(1)  # tiny models: a second thread only costs
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def own_nf4_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Quantized weights of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_cache, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache" / "models")
        yield


@pytest.fixture(autouse=True)
def patient_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other programs any rendering or compiling may take longer than a server allows."""
    monkeypatch.setattr("server.api.text.template_sandbox.RENDER_SECONDS", HANG_SECONDS)
    monkeypatch.setattr("server.api.text.grammar_compiler.COMPILE_SECONDS", HANG_SECONDS)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    fast_byte_tokenizer().save_pretrained(folder)  # for servers; the engine alone needs none
    return folder


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path)
    yield made
    made.engine.residency.close()

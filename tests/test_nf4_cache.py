"""Quantized weights kept for the next start: the same bits, or made again."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from server.model.loading import nf4_cache
from server.model.loading.loader import LoadedModel, load_model
from server.model.loading.nf4_cache import KEPT, source_key, tensors_digest
from tests.test_architectures import build

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model; the cache is empty."""
    monkeypatch.setattr(nf4_cache, "cache_folder", lambda: tmp_path / "cache" / "models")
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(str(folder), dtype, "nf4", "cpu", 0)


def kept(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "nf4").iterdir())


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The weights that are quantized."""
    found, whole = [], functional.quantize_4bit

    def quantize(weight: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(weight.numel())
        return whole(weight, *arguments, **options)

    monkeypatch.setattr(functional, "quantize_4bit", quantize)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-biases", "gpt2-conv1d", "gemma2", "phi3-fused", "mixtral"])
def test_a_second_start_has_the_same_bits_and_quantizes_nothing(
    folder: Path, quantized: list[int], kind: str, dtype: str
) -> None:
    build(kind).save_pretrained(folder)
    first = load(folder, dtype)
    assert quantized
    quantized.clear()
    second = load(folder, dtype)
    assert not quantized
    assert tensors_digest(second.model) == tensors_digest(first.model)
    assert (second.fingerprint, second.linears, second.dtype) == (first.fingerprint, first.linears, first.dtype)
    prompt = torch.arange(3, 20)[None]
    if dtype == "float32":  # in bfloat16, bitsandbytes' kernel for CPUs refuses such narrow weights
        assert torch.equal(first.model(prompt).logits, second.model(prompt).logits)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "what", ["a bit", "half", "no weights", "no digest", "another config", "a digit of the config", "an empty folder"]
)
def test_damaged_weights_are_made_again(
    folder: Path, quantized: list[int], caplog: pytest.LogCaptureFixture, what: str
) -> None:
    expected = tensors_digest(load(folder).model)
    (place,) = kept(folder)
    weights = place / "model.safetensors"
    if what == "a bit":
        damage(weights)
    if what == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    if what in ("no weights", "an empty folder"):
        weights.unlink()
    if what in ("no digest", "an empty folder"):
        (place / "checksum").unlink()
    if what in ("another config", "an empty folder"):
        (place / "config.json").write_text("{}")
    if what == "a digit of the config":
        config = (place / "config.json").read_text()
        (place / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        assert (place / "config.json").read_text() != config
    quantized.clear()
    with caplog.at_level(logging.WARNING):
        assert tensors_digest(load(folder).model) == expected
    assert quantized and "made again" in caplog.text
    quantized.clear()
    assert tensors_digest(load(folder).model) == expected and not quantized


def test_whatever_decides_the_weights_is_in_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {source_key(folder, torch.float32, CPU), source_key(folder, torch.bfloat16, CPU)}
    keys |= {source_key(folder, torch.float32, torch.device("cuda"))}
    with monkeypatch.context() as patch:
        patch.setattr(nf4_cache, "version", lambda name: "0")
        keys |= {source_key(folder, torch.float32, CPU)}
    damage(folder / "model.safetensors")
    keys |= {source_key(folder, torch.float32, CPU)}
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    keys |= {source_key(folder, torch.float32, CPU)}
    assert len(keys) == 6 and None not in keys
    (folder / "model.safetensors").unlink()
    assert source_key(folder, torch.float32, CPU) is None


def test_the_least_recently_used_weights_go_first(folder: Path) -> None:
    model = build("llama")
    first, names = "", set[str]()
    for number in range(KEPT + 1):
        with torch.no_grad():
            model.model.norm.weight.fill_(number + 1)
        model.save_pretrained(folder)
        load(folder)
        key = source_key(folder, torch.float32, CPU)
        assert key is not None
        names.add(key)
        first = first or key
    assert {place.name for place in kept(folder)} == names - {first}


def test_where_nothing_can_be_written_the_model_is_served_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "file").write_text("")
    monkeypatch.setattr(nf4_cache, "cache_folder", lambda: folder.parent / "file" / "models")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "cannot be kept" in caplog.text
    monkeypatch.setattr(nf4_cache, "cache_folder", lambda: folder.parent / "cache" / "models")
    monkeypatch.setattr(nf4_cache, "MIN_FREE", 1 << 62)
    load(folder)
    assert kept(folder) == []

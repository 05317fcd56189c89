"""How often an upload reads and hashes its weights file, counted over the API and a real engine."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest

from adapters.load import map_tensors
from adapters.peft import digest as digests
from adapters.peft.safetensors_header import TensorInfo
from adapters.peft.tensor_bytes import read_chunks
from adapters.registry.store import AdapterStore
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.thread_transport import ThreadTransport
from server.ipc.client import EngineClient
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import make_app
from tests.fixtures.engine_driver import MIB, make_driver


class Reads:
    """Counts the bytes that are read of tensors, and the digests that are computed."""

    def __init__(self) -> None:
        self.chunked = 0
        self.hashes = 0
        self.loads = 0

    def read_chunks(self, file: BinaryIO, info: TensorInfo) -> Iterator[bytearray]:
        for chunk in read_chunks(file, info):
            self.chunked += len(chunk)
            yield chunk

    def digest(self, *arguments: Any) -> str:
        self.hashes += 1
        return _digest(*arguments)

    def map_tensors(self, *arguments: Any) -> Any:
        self.loads += 1
        return map_tensors(*arguments)


_digest = digests._scan


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], other: Any) -> None:
    """Replace a function in every module that has imported it."""
    for module in [module for module in list(sys.modules.values()) if getattr(module, "__file__", None)]:
        for name, value in list(vars(module).items()):
            if value is function and module.__name__ != __name__:
                monkeypatch.setattr(module, name, other)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found = Reads()
    replace_everywhere(monkeypatch, read_chunks, found.read_chunks)
    monkeypatch.setattr(digests, "_scan", found.digest)
    replace_everywhere(monkeypatch, map_tensors, found.map_tensors)
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_adapter(tiny_llama(), tmp_path / "adapter")
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def config(llama_folder: Path, data_dir: Path) -> ServeConfig:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 * MIB, "adapter_slots": 2}
    return ServeConfig(model=str(llama_folder), data_dir=data_dir, **settings)


async def test_an_upload_is_hashed_once_and_loaded_once(
    llama_folder: Path, tmp_path: Path, files: dict[str, bytes], reads: Reads
) -> None:
    app, context, _ = make_app(tmp_path)
    settings = config(llama_folder, tmp_path / "data")
    context.engine = EngineClient(ThreadTransport(lambda: build_engine(settings)))
    await context.engine.start()
    wire = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=wire, base_url="http://localhost") as http:
        sent = {name: (name, data) for name, data in files.items()}
        created = await http.post("/v1/adapters", data={"name": "acme"}, files=sent)
    await context.sandbox.close()
    await context.engine.stop()
    assert created.status_code == 201, created.text
    record = created.json()
    assert "max_abs_logit_diff" in record["report"]["selftest"] and record["tier"] == "device"
    assert reads.hashes == 1 and reads.loads == 1  # the digest in the API; the weights in the engine
    assert reads.chunked == record["bytes"]  # read once in the API
    context.registry.close()


def test_a_later_load_verifies_the_digest(
    llama_folder: Path, tmp_path: Path, files: dict[str, bytes], reads: Reads
) -> None:
    driver = make_driver(llama_folder, tmp_path / "data")
    digest = driver.add_adapter(tmp_path / "adapter")
    weights = AdapterStore(tmp_path / "data" / "store").path(digest) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    reads.hashes = 0
    driver.submit("one", [3, 4, 5], digest)
    driver.run()
    driver.engine.close()
    assert reads.hashes == 1
    assert driver.finish_reason("one") == "error"

"""Good bytes of a version replace its damaged stored files, under every name that has the version."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from adapters.errors import AdapterNotFound
from adapters.peft.digest import digest_of
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE
from adapters.registry import store as store_module
from adapters.registry.registry import AdapterRegistry
from server.ipc.messages import MoveAdapter, ResidencyReport, RunSelfTest
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.api_server import Api, adapter_files, serving
from tests.fixtures.tiny_server import running_server, write_tiny_model
from tests.test_publishing import DOORS, NAME, Door, allowing, every_door, folder, put, sent
from tests.test_registry import publish, reopened

__all__ = ["DOORS", "folder"]


def flip(path: Path, at: int = -1) -> None:
    """Flip the bits of one byte in place, as a disk does."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped byte of the weights": lambda place: flip(place / WEIGHTS_FILE),
    "a flipped byte of the header": lambda place: flip(place / WEIGHTS_FILE, 3),
    "shorter weights": lambda place: shorten(place / WEIGHTS_FILE),
    "empty weights": lambda place: (place / WEIGHTS_FILE).write_bytes(b"") and None,
    "no weights": lambda place: (place / WEIGHTS_FILE).unlink(),
    "another config": lambda place: flip(place / CONFIG_FILE, 5),
    "no config": lambda place: (place / CONFIG_FILE).unlink(),
    "a file too many": lambda place: (place / "chat_template.jinja").write_text("x") and None,
}


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    opened = AdapterRegistry(tmp_path / "data")
    yield opened
    opened.close()


def register(registry: AdapterRegistry, name: str, seed: int = 0) -> str:
    """Publish a real adapter; its digest is that of its files."""
    with registry.store.stage() as staged:
        put(staged, adapter_files(seed))
        digest = digest_of(staged)
        inspected: Any = type("Inspected", (), {})()
        inspected.digest, inspected.rank, inspected.target_modules = digest, 8, ("q_proj",)
        inspected.nbytes, inspected.report = 100, {}
        registry.publish(name, inspected, staged, replace=True)
        return digest


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_content_heals_what_is_stored(damage: str, registry: AdapterRegistry, tmp_path: Path) -> None:
    digest = register(registry, "one")
    register(registry, "two")
    place = registry.store.path(digest)
    DAMAGES[damage](place)
    register(registry, "one")
    assert digest_of(place) == digest and sorted(path.name for path in place.iterdir()) == sorted(FILES)
    again = reopened(registry, tmp_path / "data")
    assert again.damaged == {} and again.resolve("two").version.digest == digest
    again.close()


def test_a_mark_is_gone_for_all_names_and_in_all_histories(registry: AdapterRegistry, tmp_path: Path) -> None:
    digest = register(registry, "one")
    register(registry, "two")
    register(registry, "moved")
    other = register(registry, "moved", seed=1)
    flip(registry.store.path(digest) / WEIGHTS_FILE)
    assert registry.note_check(digest, "its stored files are damaged", registry.store.signature(digest))
    again = reopened(registry, tmp_path / "data")  # the mark is durable
    assert again.damaged == dict.fromkeys(["one", "two"], "its stored files are damaged")
    assert again.resolve("moved").version.digest == other
    with pytest.raises(AdapterNotFound):
        again.rollback("moved", digest)
    register(again, "third")
    assert again.damaged == {}
    for name in ("one", "two", "third", f"moved@{digest}"):
        assert again.resolve(name).version.digest == digest
    assert again.rollback("moved", None).version.digest == digest
    again.close()
    last = AdapterRegistry(tmp_path / "data")
    assert last.damaged == {}
    last.close()


def test_a_mark_on_sound_files_is_gone_as_well(registry: AdapterRegistry) -> None:
    digest = register(registry, "one")
    assert registry.note_check(digest, "the disk did not respond", registry.store.signature(digest))
    before = os.stat(registry.store.path(digest) / WEIGHTS_FILE).st_ino
    register(registry, "two")
    assert registry.damaged == {} and os.stat(registry.store.path(digest) / WEIGHTS_FILE).st_ino == before


def test_other_bytes_of_the_same_content_are_not_written(registry: AdapterRegistry) -> None:
    digest = register(registry, "one")
    config = registry.store.path(digest) / CONFIG_FILE
    config.write_text(config.read_text() + "\n")
    register(registry, "one")
    assert config.read_text().endswith("\n")


def test_a_result_for_files_that_were_replaced_meanwhile_is_dropped(registry: AdapterRegistry) -> None:
    digest = register(registry, "one")
    before = registry.store.signature(digest)
    flip(registry.store.path(digest) / WEIGHTS_FILE)
    register(registry, "one")
    assert not registry.note_check(digest, "damaged", before)
    assert registry.damaged == {}
    registry.retire("one")
    registry.collect_garbage()
    assert not registry.note_check(digest, "damaged", ())


@pytest.mark.parametrize("step", range(4))
def test_a_crash_at_each_step_leaves_every_file_and_the_next_upload_heals(
    step: int, registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = register(registry, "one")
    place = registry.store.path(digest)
    flip(place / WEIGHTS_FILE)
    flip(place / CONFIG_FILE, 5)
    steps = iter(range(4))

    class Crash(BaseException):
        pass

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            if next(steps) == step:
                raise Crash
            return function(*arguments)

        return wrapper

    monkeypatch.setattr(store_module, "_fsync", crashing(store_module._fsync))
    monkeypatch.setattr(os, "replace", crashing(os.replace))
    with pytest.raises(Crash):
        register(registry, "one")
    monkeypatch.undo()
    again = reopened(registry, tmp_path / "data")
    assert digest in again.store
    register(again, "one")
    assert digest_of(place) == digest
    again.close()


DAMAGE_AND_HEAL = """
import sys
from pathlib import Path
from adapters.peft.files import WEIGHTS_FILE
from adapters.registry.registry import AdapterRegistry
from tests.test_healing import flip, register
registry = AdapterRegistry(Path(sys.argv[1]))
print("open", flush=True)
while True:
    digest = register(registry, "one")
    flip(registry.store.path(digest) / WEIGHTS_FILE)
    registry.note_check(digest, "damaged", registry.store.signature(digest))
    print("damaged", flush=True)
"""


@pytest.mark.reliability("T10")
@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_what_the_next_upload_heals(tmp_path: Path) -> None:
    moments = random.Random(1)
    for _ in range(3):
        command = [sys.executable, "-c", DAMAGE_AND_HEAL, str(tmp_path / "data")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            for _ in range(moments.randint(1, 5)):
                child.stdout.readline()
            time.sleep(moments.random() * 0.05)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        registry = AdapterRegistry(tmp_path / "data")
        digest = register(registry, "one")
        assert registry.damaged == {} and registry.resolve("one").version.digest == digest
        assert digest_of(registry.store.path(digest)) == digest
        registry.close()


# --- through the API ---


@every_door
async def test_each_door_heals(door: Door, tmp_path: Path, folder: Path) -> None:
    async with serving(**allowing(tmp_path)) as api:
        assert await door(api, folder) is None
        digest = api.context.registry.record(NAME).version.digest
        place = api.context.registry.store.path(digest)
        flip(place / WEIGHTS_FILE)
        api.context.registry.note_check(digest, "damaged", api.context.registry.store.signature(digest))
        assert list(api.context.registry.damaged) == [NAME]
        assert await door(api, folder) is None
        assert digest_of(place) == digest and api.context.registry.damaged == {}
        assert (await api.http.get(f"/v1/adapters/{NAME}")).json()["state"] == "ready"


def _fails(api: Api, digest: str) -> None:
    api.context.engine.residency = ResidencyReport(failed={digest: "content is not its own"})


async def test_the_engine_forgets_that_it_could_not_load_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload is not blamed: bytes that were replaced are those that were hashed a moment ago."""
    async with serving(tmp_path) as api:
        digest = (await api.upload("acme")).json()["version"].removeprefix("sha256:")
        flip(api.context.registry.store.path(digest) / WEIGHTS_FILE)
        _fails(api, digest)
        assert (await api.http.get("/v1/adapters/acme")).json()["state"] == "failed"
        messages = sent(api, monkeypatch)
        assert (await api.upload("another")).status_code == 201
        assert [m.verify for m in messages if isinstance(m, RunSelfTest)] == [False]
        assert [(m.digest, m.tier) for m in messages if isinstance(m, MoveAdapter)] == [(digest, "disk")]
        for name in ("acme", "another"):
            assert (await api.http.get(f"/v1/adapters/{name}")).json()["state"] == "ready"


def test_publishing_other_content_leaves_a_mark(registry: AdapterRegistry) -> None:
    digest = register(registry, "one")
    registry.note_check(digest, "damaged", registry.store.signature(digest))
    publish(registry, "two", "v1")
    assert registry.damaged == {"one": "damaged"}


# --- with a real engine ---


@pytest.mark.slow
def test_a_whole_server_recovers_by_the_same_upload(tmp_path: Path) -> None:
    """A request meets the damage first; the next upload repairs it, and requests are served at once."""
    write_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    write_adapter(model, tmp_path / "adapter", seed=1, r=4, scale=0.3, target_modules="all-linear")
    flags = ("--model", str(tmp_path / "model"), "--dtype", "float32", "--threads", "1", "--kv-cache-bytes", "33554432")
    flags += ("--adapter-packed-bytes", "0")  # a load from a packed copy would not meet the damage
    with running_server(tmp_path / "data", *flags) as server, server.client() as client:
        version = server.upload(client, "acme", tmp_path / "adapter").json()["version"].removeprefix("sha256:")
        server.upload(client, "alike", tmp_path / "adapter").raise_for_status()
        text = server.complete(client, "acme", "hello")["choices"][0]["text"]
        place = tmp_path / "data" / "store" / version[:2] / version
        for again in ("acme", "third"):  # with an earlier self-test, and with one of its own
            flip(place / WEIGHTS_FILE)
            client.post("/v1/adapters/acme/unload").raise_for_status()
            refused = client.post("/v1/completions", json={"model": "alike", "prompt": "hello"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "adapter_failed"
            assert client.get("/v1/adapters/acme").json()["state"] == "failed"
            assert server.upload(client, again, tmp_path / "adapter").is_success
            for name in ("acme", "alike", again):
                assert client.get(f"/v1/adapters/{name}").json()["state"] == "ready"
                assert server.complete(client, name, "hello")["choices"][0]["text"] == text
        assert digest_of(place) == version

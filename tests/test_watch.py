"""The watched folder: what a poll registers, what it leaves alone, and what it reports."""

import asyncio
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import NoSpace
from server import serve
from server.api.adapters import publishing
from server.api.adapters import watcher as watch
from server.api.adapters.watcher import FolderWatcher
from server.ipc.messages import RunSelfTest, ToEngine
from server.ipc.supervisor import EngineUnavailable
from tests.fixtures.api_server import BASE, Api, adapter_files, assert_error, serving
from tests.fixtures.timing import eventually
from tests.test_api_composition import digest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "watched"
    folder.mkdir()
    return folder


def put(folder: Path, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in adapter_files(seed).items():
        (folder / name).write_bytes(data)


async def polls(watcher: FolderWatcher, times: int = 2) -> None:
    """Two let what is there settle and be registered."""
    for _ in range(times):
        await watcher.poll()


async def record(api: Api, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (await api.http.get(f"/v1/adapters/{name}")).json()
    return found


def selftest_requests(api: Api, monkeypatch: pytest.MonkeyPatch) -> list[RunSelfTest]:
    """The self-tests from now on."""
    found: list[RunSelfTest] = []
    send = api.engine.send

    def noting(message: ToEngine) -> None:
        if isinstance(message, RunSelfTest):
            found.append(message)
        send(message)

    monkeypatch.setattr(api.engine, "send", noting)
    return found


async def test_folders_are_registered_and_followed(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        await polls(watcher)
        made = await record(api, "acme")
        assert made["state"] == "ready" and made["source"] == (root / "acme").as_uri()
        assert "max_abs_logit_diff" in made["report"]["selftest"]
        put(root / "acme", seed=1)
        put(root / "beta", seed=2)
        await polls(watcher)
        assert (await record(api, "acme"))["version"] != made["version"]
        assert [r.name for r in api.context.registry.walk()] == ["acme", "beta"]
        put(root / "acme")  # an operator who goes back by copying the old files means it
        await polls(watcher)
        assert (await record(api, "acme"))["version"] == made["version"]
        assert len(api.context.registry.history("acme")) == 2


async def test_folders_in_folders_are_named_as_the_hub_names_them(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        (root / "Acme").mkdir()
        for place in ("Acme/Support", "Acme/.hidden", "plain", "plain/checkpoint-1"):
            put(root / place, seed=1)
        await FolderWatcher(api.context, root).first_pass()
        assert [r.name for r in api.context.registry.walk()] == ["Acme/Support", "plain"]
        assert (await record(api, "Acme/Support"))["source"] == (root / "Acme" / "Support").as_uri()


@pytest.mark.parametrize("weights", ["adapter_model.bin", "adapters.safetensors", "lora.gguf"])
async def test_weights_in_another_format_are_reported(
    weights: str, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as api:
        put(root / "acme")
        (root / "acme" / "adapter_model.safetensors").rename(root / "acme" / weights)
        watcher = FolderWatcher(api.context, root)
        await polls(watcher)
        failed = await record(api, "acme")
        assert failed["state"] == "failed" and weights in failed["error"] and "loraplex convert" in failed["error"]
        assert weights in caplog.text
        put(root / "acme")
        await polls(watcher)
        assert (await record(api, "acme"))["state"] == "ready"


async def test_what_changes_between_polls_waits(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        weights = root / "acme" / "adapter_model.safetensors"
        whole = weights.read_bytes()
        for size in (100, 1000, 2000):  # being copied
            weights.write_bytes(whole[:size])
            await watcher.poll()
        assert "acme" not in api.context.registry and not api.context.registry.pending
        weights.write_bytes(whole)
        await watcher.poll()
        assert "acme" not in api.context.registry
        await watcher.poll()
        assert "acme" in api.context.registry


async def test_a_folder_that_changes_while_it_is_read_waits(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        await watcher.poll()
        copy = watch.copy_from

        def copy_and_write(*arguments: Any, **options: Any) -> str:
            copied = copy(*arguments, **options)
            put(root / "acme", seed=1)
            return copied

        monkeypatch.setattr(watch, "copy_from", copy_and_write)
        await watcher.poll()
        assert "acme" not in api.context.registry
        monkeypatch.undo()
        await polls(watcher)
        assert (await digest(api, "acme")) in api.context.registry.store


async def test_an_unchanged_folder_is_read_once(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        watcher, selftests = FolderWatcher(api.context, root), selftest_requests(api, monkeypatch)
        put(root / "acme")
        await polls(watcher, 6)
        assert len(selftests) == 1
        await polls(FolderWatcher(api.context, root), 3)  # as after a restart
        assert len(selftests) == 1 and len(api.context.registry.history("acme")) == 1


async def test_a_folder_that_goes_away_changes_nothing(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        await polls(watcher)
        shutil.rmtree(root)
        await polls(watcher)
        assert (await api.chat(model="acme")).status_code == 200
        root.mkdir()
        put(root / "acme", seed=1)
        await polls(watcher)
        assert len(api.context.registry.history("acme")) == 2


async def test_an_invalid_one_is_reported_until_it_is_repaired(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        config = root / "acme" / "adapter_config.json"
        config.write_text("{")
        with caplog.at_level(logging.WARNING):
            await polls(watcher, 5)
        assert len([line for line in caplog.messages if "acme" in line]) == 1
        failed = await record(api, "acme")
        assert failed["state"] == "failed" and "adapter_config.json" in failed["error"]
        assert_error(await api.chat(model="acme"), 404, "model_not_found")
        put(root / "acme")
        await polls(watcher)
        repaired = await record(api, "acme")
        assert (repaired["state"], repaired["error"]) == ("ready", None)
        config.write_text("{")
        await polls(watcher)
        broken = await record(api, "acme")
        assert broken["version"] == repaired["version"] and "adapter_config.json" in broken["error"]
        assert (await api.chat(model="acme")).status_code == 200
        put(root / "acme")
        await polls(watcher)
        assert (await record(api, "acme"))["error"] is None


async def test_names_of_others_are_left_alone(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        version = await digest(api, "acme")
        await api.http.put("/v1/adapters/prod/split", json={"weights": {"acme": 1}})
        for name in ("acme", "prod", BASE, "not a name", ".hidden"):
            put(root / name, seed=1)
        (root / "a-file").write_text("x")
        (root / "no-adapter").mkdir()
        await polls(FolderWatcher(api.context, root))
        assert [r.name for r in api.context.registry.walk()] == ["acme"]
        assert await digest(api, "acme") == version
        assert "from another source" in (await record(api, "acme"))["error"]


async def test_what_was_rolled_back_stays_so_after_a_restart(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        await polls(watcher)
        first = await digest(api, "acme")
        put(root / "acme", seed=1)
        await polls(watcher)
        await api.http.post("/v1/adapters/acme/rollback")
        await polls(watcher)
        await polls(FolderWatcher(api.context, root))
        assert await digest(api, "acme") == first
        put(root / "acme", seed=2)
        await polls(watcher)
        assert await digest(api, "acme") != first


async def test_links_that_lead_out_are_followed(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        put(tmp_path / "outside")
        put(root / "inside", seed=1)
        (root / "link-out").symlink_to(tmp_path / "outside")
        (root / "link-in").symlink_to(root / "inside")
        put(root / "file-out", seed=2)
        (root / "file-out" / "adapter_model.safetensors").unlink()
        os.symlink(tmp_path / "outside" / "adapter_model.safetensors", root / "file-out" / "adapter_model.safetensors")
        await polls(FolderWatcher(api.context, root))
        assert [r.name for r in api.context.registry.walk()] == ["file-out", "inside", "link-in", "link-out"]


async def test_a_folder_of_the_hubs_cache_is_registered(tmp_path: Path, root: Path) -> None:
    async with serving(tmp_path) as api:
        cache = tmp_path / "models--org--repo"
        (cache / "blobs").mkdir(parents=True)
        snapshot = cache / "snapshots" / "f00d"
        snapshot.mkdir(parents=True)
        for number, (name, data) in enumerate(adapter_files(0).items()):
            (cache / "blobs" / str(number)).write_bytes(data)
            (snapshot / name).symlink_to(Path("../../blobs") / str(number))
        (root / "watched").symlink_to(snapshot)
        await polls(FolderWatcher(api.context, root))
        await serve._register(api.context, "named", snapshot)
        assert [r.name for r in api.context.registry.walk()] == ["named", "watched"]
        assert await digest(api, "named") == await digest(api, "watched")
        (root / "gone").mkdir()
        for name in adapter_files(0):
            (root / "gone" / name).symlink_to(tmp_path / "absent")
        await polls(FolderWatcher(api.context, root))
        assert "gone" not in api.context.registry


@pytest.mark.parametrize("trouble", [EngineUnavailable("it restarts"), NoSpace("the disk is full")])
async def test_trouble_of_the_server_is_no_fault_of_the_folder(
    trouble: Exception, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def examine(*_: Any) -> None:
        raise trouble

    async with serving(tmp_path) as api:
        watcher = FolderWatcher(api.context, root)
        put(root / "acme")
        monkeypatch.setattr(publishing, "examine", examine)
        await polls(watcher, 3)
        assert api.context.registry.pending == {}
        monkeypatch.undo()
        await watcher.poll()
        assert "acme" in api.context.registry


async def test_a_server_watches_from_when_it_is_up(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.001)
    put(root / "acme")
    async with serving(tmp_path, watch_adapters=str(root)) as api:
        up: Any = SimpleNamespace(started=True, url="http://test")
        starting = asyncio.create_task(asyncio.sleep(0))
        serving_up = asyncio.create_task(serve._bring_up(api.context, starting, up))
        await eventually(lambda: "acme" in api.context.registry)
        assert not serving_up.done()
        serving_up.cancel()
        await asyncio.wait([serving_up])


async def test_what_nobody_foresaw_is_logged(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(watch, "_signatures", broken)
    async with serving(tmp_path) as api:
        with pytest.raises(RuntimeError):
            await FolderWatcher(api.context, root).run()
    assert "no longer watched" in caplog.text

"""Registering from a source: while the client waits, in the background, and across restarts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from adapters.registry.registry import AdapterRegistry
from adapters.sources import download
from server.api.adapters import fetching
from server.api.adapters.publishing import Published
from server.api.adapters.schemas import RegisterRequest
from server.api.context import MAX_FETCHES, AppContext
from server.ipc.supervisor import EngineState
from tests.fixtures import remote_servers
from tests.fixtures.api_server import Api, adapter_files, assert_error, serving
from tests.fixtures.remote_servers import Remote
from tests.fixtures.timing import eventually


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """A hub with a valid adapter; who has to try again waits long."""
    with remote_servers.hub() as remote:
        remote_servers.use_hub(remote, monkeypatch)
        monkeypatch.setattr(download, "WAITS_SECONDS", (3600.0,))
        remote.files = dict(adapter_files())
        yield remote


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name, data in adapter_files().items():
        (path / name).write_bytes(data)
    return path


async def test_a_dry_run_of_a_source_publishes_nothing(tmp_path: Path) -> None:
    source = _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        body = {"name": "acme", "source": f"file://{source}"}
        tried = await api.http.post("/v1/adapters?dry_run=true", json=body)
        assert tried.status_code == 200 and tried.json()["dry_run"]
        assert_error(await api.http.get("/v1/adapters/acme"), 404)
        assert (await api.http.post("/v1/adapters", json=body)).json()["version"] == tried.json()["version"]


async def test_register_from_a_hub(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAITS_SECONDS", (0.0,))
    async with serving(tmp_path / "server", allow_source=("hf://org",), max_upload_bytes=1 << 20) as api:
        body = {"name": "acme", "source": "hf://org/repo@main"}
        created = await api.http.post("/v1/adapters", json=body)
        assert created.status_code == 201
        assert created.json()["source"] == f"hf://org/repo@{remote_servers.COMMIT}"
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 200
        remote.faults = {"main": [500, 400]}
        assert_error(await api.http.post("/v1/adapters", json=body), 503, "source_unavailable")
        assert_error(await api.http.post("/v1/adapters", json={**body, "source": "hf://org/none"}), 404)
        assert_error(await api.http.post("/v1/adapters", json={**body, "source": "hf://org-evil/repo"}), 403)
        remote.files["adapter_model.safetensors"] += b"x" * (1 << 20)
        assert_error(await api.http.post("/v1/adapters", json=body), 413)
        remote.files["adapter_model.safetensors"] = b"no tensors"
        assert_error(await api.http.post("/v1/adapters", json={**body, "replace": True}), 422)
        assert list((tmp_path / "server" / "data" / "store" / ".staging").iterdir()) == []


async def test_what_is_not_fetched_when_the_server_ends_is_fetched_by_the_next_one(tmp_path: Path) -> None:
    allowed = (f"file://{tmp_path}/allowed",)
    late = f"file://{tmp_path}/allowed/late"
    async with serving(tmp_path / "server", allow_source=allowed) as api:
        body = {"name": "gone", "source": f"file://{tmp_path}/allowed/gone", "lazy": True}
        await api.http.post("/v1/adapters", json=body)
        await asyncio.gather(*api.context.fetching.values())
        body = {"name": "late", "source": late, "lazy": True, "pinned": True}
        await api.http.post("/v1/adapters", json=body)
        api.context.fetching["late"].cancel()  # as the end of the event loop does, before anything was fetched
    _folder(tmp_path / "allowed" / "late")
    async with serving(tmp_path / "server", allow_source=allowed) as api:
        states = {r["name"]: r["state"] for r in (await api.http.get("/v1/adapters")).json()["data"]}
        assert states == {"gone": "failed", "late": "registered"}
        assert_error(await api.chat(model="late"), 503, "adapter_loading")
        fetching.resume(api.context)
        assert list(api.context.fetching) == ["late"]  # what failed is not tried again by itself
        await asyncio.gather(*api.context.fetching.values())
        record = (await api.http.get("/v1/adapters/late")).json()
        assert record["state"] == "ready" and record["pinned"] and record["source"] == late
    async with serving(tmp_path / "server", allow_source=allowed) as api:
        assert list(api.context.registry.pending) == ["gone"]
        assert (await api.http.delete("/v1/adapters/gone")).status_code == 200
        assert not api.context.registry.pending


async def test_a_failed_adapter_can_be_registered_again(tmp_path: Path) -> None:
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        body = {"name": "acme", "source": f"file://{tmp_path}/allowed/acme", "lazy": True}
        await api.http.post("/v1/adapters", json=body)
        await asyncio.gather(*api.context.fetching.values())
        _folder(tmp_path / "allowed" / "acme")
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
        await asyncio.gather(*api.context.fetching.values())
        assert (await api.http.get("/v1/adapters/acme")).json()["state"] == "ready"
        assert not api.context.registry.pending


async def test_a_lazy_source_that_is_not_allowed_is_refused_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        body = {"name": "acme", "source": "hf://org/repo@main", "lazy": True}
        assert_error(await api.http.post("/v1/adapters", json=body), 403, "source_not_allowed")
        assert_error(await api.http.post("/v1/adapters", json={**body, "source": "file:///etc"}), 403)
        assert_error(await api.http.get("/v1/adapters/acme"), 404)


async def test_an_adapter_can_be_deleted_while_it_is_fetched(remote: Remote, tmp_path: Path) -> None:
    async with serving(tmp_path, allow_source=("hf://org",)) as api:
        remote.faults = {"main": [503]}
        body = {"name": "acme", "source": "hf://org/repo@main", "lazy": True}
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
        assert_error(await api.http.post("/v1/adapters", json=body), 409)
        answer = await api.http.delete("/v1/adapters/acme")
        assert answer.json() == {"name": "acme", "deleted": True, "drained": 0, "aborted": 0}
        assert not api.context.fetching and not api.context.registry.pending
        assert_error(await api.http.get("/v1/adapters/acme"), 404)
        await asyncio.to_thread(api.context.fetchers.shutdown)  # its thread waits for nothing any more


async def test_what_is_served_stays_when_its_replacement_cannot_be_fetched(tmp_path: Path) -> None:
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        await api.upload("acme")
        before = (await api.http.get("/v1/adapters/acme")).json()["version"]
        body = {"name": "acme", "source": f"file://{tmp_path}/allowed/none", "lazy": True, "replace": True}
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
        await asyncio.gather(*api.context.fetching.values())
        record = (await api.http.get("/v1/adapters/acme")).json()
        assert (record["state"], record["version"]) == ("ready", before)
        assert "could not be fetched" in record["error"]
        assert (await api.chat(model="acme")).status_code == 200
        await api.upload("acme", seed=1, replace="true")
        assert (await api.http.get("/v1/adapters/acme")).json()["error"] is None


async def test_an_engine_that_is_away_fails_no_lazy_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[RegisterRequest] = []
    register = fetching.register

    async def noted(context: AppContext, body: RegisterRequest) -> Published:
        attempts.append(body)
        return await register(context, body)

    monkeypatch.setattr(fetching, "register", noted)
    monkeypatch.setattr(fetching, "_ENGINE_POLL_SECONDS", 0.01)
    source = _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        api.context.engine._supervisor.state = EngineState.RESTARTING
        await api.http.post("/v1/adapters", json={"name": "acme", "source": f"file://{source}", "lazy": True})
        await eventually(lambda: len(attempts) == 3)
        assert api.context.fetching and api.context.registry.pending["acme"].error is None
        api.context.engine._supervisor.state = EngineState.READY
        await asyncio.gather(*api.context.fetching.values())
        assert (await api.http.get("/v1/adapters/acme")).json()["state"] == "ready"


def held_back(monkeypatch: pytest.MonkeyPatch, registry: AdapterRegistry, method: str) -> tuple[Event, Event]:
    """Hold back a method of the registry in its thread: returns what says that it has begun, and what lets it go on."""
    begun, go_on = Event(), Event()
    original = getattr(registry, method)

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return original(*arguments, **options)

    monkeypatch.setattr(registry, method, slow)
    return begun, go_on


async def delete_while_held_back(api: Api, begun: Event, go_on: Event) -> None:
    """Delete the adapter once the call that is held back has begun, and see that the deletion waits for it."""
    await eventually(begun.is_set)
    deleting = asyncio.create_task(api.http.delete("/v1/adapters/acme"))
    await asyncio.sleep(0.1)
    assert not deleting.done()
    go_on.set()
    assert (await deleting).json()["deleted"]
    await asyncio.sleep(0.05)


async def begin_lazily(api: Api, tmp_path: Path) -> dict[str, Any]:
    body = {"name": "acme", "source": f"file://{tmp_path}/allowed/acme", "lazy": True}
    assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
    return body


@pytest.mark.parametrize("method", ["hold", "publish"])
async def test_nothing_is_published_after_a_deletion(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes the registry cannot be cancelled, so the deletion waits for it."""
    _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        registry = api.context.registry
        begun, go_on = held_back(monkeypatch, registry, method)
        await begin_lazily(api, tmp_path)
        await delete_while_held_back(api, begun, go_on)
        assert "acme" not in registry and not registry.pending and registry.store.digests() == []
        assert_error(await api.http.get("/v1/adapters/acme"), 404)
        monkeypatch.undo()
        assert registry.collect_garbage() == []  # the hold was released
        assert (await api.upload("acme")).status_code == 201


async def test_a_failure_is_not_noted_after_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        await begin_lazily(api, tmp_path)  # there is no such folder
        begun, go_on = held_back(monkeypatch, api.context.registry, "remember")
        await delete_while_held_back(api, begun, go_on)
        assert not api.context.registry.pending


async def test_an_adapter_registered_again_during_its_deletion_stays(tmp_path: Path) -> None:
    _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        await begin_lazily(api, tmp_path)
        async with api.context.lock("acme"):
            forgetting = asyncio.create_task(fetching.forget(api.context, "acme"))
            await eventually(lambda: not api.context.fetching)
            pending = api.context.registry.pending["acme"]
            fetching._start_fetching(api.context, pending)  # as a registration under the lock does
        await forgetting
        assert api.context.registry.pending == {"acme": pending} or "acme" in api.context.registry
        await asyncio.gather(*api.context.fetching.values())
        assert "acme" in api.context.registry


async def test_lazy_adapters_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _folder(tmp_path / "allowed" / "acme")
    running: list[int] = []
    at_once = 0
    register = fetching.register

    async def counted(context: AppContext, body: RegisterRequest) -> Published:
        nonlocal at_once
        running.append(1)
        at_once = max(at_once, len(running))
        try:
            return await register(context, body)
        finally:
            running.pop()

    monkeypatch.setattr(fetching, "register", counted)
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        for number in range(3 * MAX_FETCHES):
            body = {"name": f"n{number}", "source": f"file://{source}", "lazy": True}
            assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
        await asyncio.gather(*api.context.fetching.values())
        assert len(api.context.registry) == 3 * MAX_FETCHES and at_once <= MAX_FETCHES

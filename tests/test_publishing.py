"""Every way of publishing leads through one pipeline: self-test, the lock of the name, and the engine's update."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from adapters.errors import AdapterError
from server import serve
from server.api.adapters.watcher import FolderWatcher
from server.ipc.messages import MoveAdapter, PinAdapter, RetireAdapter, RunSelfTest, SelfTest, ToEngine
from tests.fixtures.api_server import Api, adapter_files, made_files, serving
from tests.fixtures.timing import eventually

NAME = "acme"
Files = dict[str, bytes]
Door = Callable[[Api, Path], Awaitable[str | None]]  # publishes a folder as NAME; returns the reason of a refusal


async def upload(api: Api, folder: Path) -> str | None:
    files = {path.name: (path.name, path.read_bytes()) for path in folder.iterdir()}
    return refusal(await api.http.post("/v1/adapters", data={"name": NAME, "replace": "true"}, files=files))


async def register(api: Api, folder: Path) -> str | None:
    body = {"name": NAME, "source": folder.as_uri(), "replace": True}
    return refusal(await api.http.post("/v1/adapters", json=body))


async def register_lazily(api: Api, folder: Path) -> str | None:
    body = {"name": NAME, "source": folder.as_uri(), "replace": True, "lazy": True}
    assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
    await asyncio.gather(*api.context.fetching.values())
    pending = api.context.registry.pending.get(NAME)
    return pending.error if pending else None


async def load_as_vllm(api: Api, folder: Path) -> str | None:
    body = {"lora_name": NAME, "lora_path": str(folder), "load_inplace": True}
    return refusal(await api.http.post("/v1/load_lora_adapter", json=body))


async def watch(api: Api, folder: Path) -> str | None:
    watcher = FolderWatcher(api.context, folder.parent)
    for _ in range(2):  # to settle, and to be registered
        await watcher.poll()
    pending = api.context.registry.pending.get(NAME)
    return pending.error if pending else None


async def start(api: Api, folder: Path) -> str | None:
    try:
        await serve._register(api.context, NAME, folder)
    except AdapterError as error:
        return str(error)
    return None


def refusal(response: Any) -> str | None:
    if response.is_success:
        return None
    message: str = response.json()["error"]["message"]
    return message


DOORS: list[Door] = [upload, register, register_lazily, load_as_vllm, watch, start]
every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Files:
    """The files of a valid adapter with one tensor changed."""
    files = dict(adapter_files(1))
    tensors = load(files["adapter_model.safetensors"])
    name = max(tensors)
    return files | {"adapter_model.safetensors": save(tensors | {name: change(tensors[name]).contiguous()})}


def with_rank(rank: int) -> Files:
    config = json.loads(adapter_files(1)["adapter_config.json"]) | {"r": rank}
    return adapter_files(1) | {"adapter_config.json": json.dumps(config).encode()}


BAD: dict[str, tuple[Callable[[], Files], dict[str, Any]]] = {
    "a NaN": (lambda: with_tensor(lambda tensor: tensor.fill_(float("nan"))), {}),
    "another shape": (lambda: with_tensor(lambda tensor: tensor[:-1]), {}),
    "another rank": (lambda: with_rank(5), {}),
    "no tensors": (lambda: adapter_files(1) | {"adapter_model.safetensors": b"no tensors"}, {}),
    "a failed self-test": (lambda: adapter_files(1), {"selftest": SelfTest(0.5, 0.1, 1e-3)}),
    "logits that are not finite": (lambda: adapter_files(1), {"selftest": SelfTest(*[float("nan")] * 2, 1e-3)}),
    "a load that fails": (lambda: adapter_files(1), {"selftest_error": ("invalid", "weights beyond bfloat16")}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "allowed" / NAME, adapter_files())


def put(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def allowing(tmp_path: Path) -> dict[str, Any]:
    return {"folder": tmp_path / "server", "allow_source": (f"file://{tmp_path}/allowed",)}


def sent(api: Api, monkeypatch: pytest.MonkeyPatch) -> list[ToEngine]:
    """The messages to the engine from now on."""
    found: list[ToEngine] = []
    send = api.engine.send
    monkeypatch.setattr(api.engine, "send", lambda message: (found.append(message), send(message)))
    return found


def current(api: Api) -> str:
    return api.context.registry.record(NAME).version.digest


@every_door
async def test_each_door_runs_the_self_test_on_bytes_hashed_a_moment_ago(
    door: Door, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(**allowing(tmp_path)) as api:
        messages = sent(api, monkeypatch)
        assert await door(api, folder) is None
        assert [(m.digest, m.verify) for m in messages if isinstance(m, RunSelfTest)] == [(current(api), False)]
        assert api.context.registry.record(NAME).version.report["selftest"] == {"max_abs_logit_diff": 2e-6}


@pytest.mark.parametrize("door", [upload, register, load_as_vllm, watch, start], ids=lambda door: door.__name__)
async def test_each_door_waits_for_the_lock_of_the_name(door: Door, tmp_path: Path, folder: Path) -> None:
    async with serving(**allowing(tmp_path)) as api:
        async with api.context.lock(NAME):
            publishing = asyncio.ensure_future(door(api, folder))
            await eventually(lambda: api.context.registry.store.digests() != [])  # it is being self-tested
            await asyncio.sleep(0.05)
            assert NAME not in api.context.registry
        assert await publishing is None
        assert NAME in api.context.registry


@every_door
async def test_each_door_has_the_engine_follow(
    door: Door, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old version is released, and the pin moves to the new one."""
    async with serving(**allowing(tmp_path)) as api:
        await door(api, folder)
        old = current(api)
        await api.http.post(f"/v1/adapters/{NAME}/pin")
        put(folder, adapter_files(1))
        messages = sent(api, monkeypatch)
        assert await door(api, folder) is None
        follow = [m for m in messages if isinstance(m, RetireAdapter | PinAdapter)]
        assert [(type(m), m.digest) for m in follow] == [(RetireAdapter, old), (PinAdapter, current(api))]
        assert api.engine.pinned == {current(api)} != {old}


@every_door
async def test_unchanged_bytes_are_not_tested_again(
    door: Door, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(**allowing(tmp_path)) as api:
        await door(api, folder)
        before, messages = api.context.registry.record(NAME), sent(api, monkeypatch)
        assert await door(api, folder) is None
        assert messages == [] and api.context.registry.record(NAME) == before


@every_door
async def test_a_version_that_was_never_tested_is_tested(
    door: Door, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own bytes in the store, which the engine verifies; the report has the result from then on."""
    async with serving(**allowing(tmp_path)) as api:
        api.engine.selftest_error = ("no_room", "no device slot became free")
        await door(api, folder)
        assert "skipped" in api.context.registry.record(NAME).version.report["selftest"]
        api.engine.selftest_error = None
        messages = sent(api, monkeypatch)
        assert await door(api, folder) is None
        assert [m.verify for m in messages if isinstance(m, RunSelfTest)] == [True]
        assert api.context.registry.record(NAME).version.report["selftest"] == {"max_abs_logit_diff": 2e-6}


@pytest.mark.parametrize("kind", BAD)
async def test_each_door_refuses_a_bad_adapter_in_the_same_words(kind: str, tmp_path: Path) -> None:
    files, engine = BAD[kind]
    words = {}
    for door in DOORS:
        own = tmp_path / door.__name__
        folder = put(own / "allowed" / NAME, files())
        async with serving(**allowing(own)) as api:
            for attribute, value in engine.items():
                setattr(api.engine, attribute, value)
            words[door.__name__] = await door(api, folder)
            assert NAME not in api.context.registry and api.context.registry.store.digests() == []
    assert len(set(words.values())) == 1 and words["upload"], words


@pytest.mark.reliability("T18")
@every_door
async def test_what_is_served_stays_when_its_replacement_is_refused(
    door: Door, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(**allowing(tmp_path)) as api:
        await door(api, folder)
        old = current(api)
        api.engine.selftest = SelfTest(0.5, 0.1, 1e-3)
        put(folder, made_files(1, lora_alpha=8))  # another structure, which is tested
        assert await door(api, folder)
        assert current(api) == old and api.context.registry.store.digests() == [old]


async def test_a_dry_run_tests_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        await api.upload(NAME)
        messages = sent(api, monkeypatch)
        files = {name: (name, data) for name, data in adapter_files().items()}
        answer = await api.http.post("/v1/adapters?dry_run=true", data={"name": NAME}, files=files)
        assert answer.json()["report"]["selftest"] == {"max_abs_logit_diff": 2e-6}
        assert [m.verify for m in messages if isinstance(m, RunSelfTest)] == [True]


async def test_a_pin_that_cannot_move_along_does_not_end_the_start(tmp_path: Path, folder: Path) -> None:
    async with serving(**allowing(tmp_path)) as api:
        await start(api, folder)
        await api.http.post(f"/v1/adapters/{NAME}/pin")
        put(folder, adapter_files(1))
        old, api.engine.refuse = current(api), AlwaysRefused()
        assert await start(api, folder) is None
        assert current(api) != old and not api.context.registry.record(NAME).pinned


class AlwaysRefused(dict[str, Any]):
    def get(self, *_: object) -> Any:
        return ("no_room", "every device slot is pinned")


# --- versions that differ from a tested one in nothing but their numbers ---


def scaled_files(factor: float, **lora_config: Any) -> Files:
    """The second version of a trainer: the numbers of the first times `factor`."""
    files = made_files(0, **lora_config)
    tensors = {
        name: (tensor * factor).contiguous() for name, tensor in load(files["adapter_model.safetensors"]).items()
    }
    return files | {"adapter_model.safetensors": save(tensors)}


async def publish(api: Api, files: Files, messages: list[ToEngine], **fields: str) -> list[str]:
    """Publish and return what the engine was asked to do with the version."""
    messages.clear()
    sent_files = {name: (name, data) for name, data in files.items()}
    path = f"/v1/adapters?dry_run={fields.pop('dry_run', 'false')}"
    response = await api.http.post(path, data={"name": NAME, "replace": "true", **fields}, files=sent_files)
    assert response.status_code in (200, 201), response.text
    return [type(m).__name__ for m in messages if isinstance(m, RunSelfTest | MoveAdapter)]


async def test_the_next_version_of_a_trainer_is_loaded_and_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        messages = sent(api, monkeypatch)
        assert await publish(api, scaled_files(1), messages) == ["RunSelfTest"]
        tested = current(api)
        assert await publish(api, scaled_files(1.5), messages) == ["MoveAdapter"]
        (move,) = [m for m in messages if isinstance(m, MoveAdapter)]
        assert (move.digest, move.tier, move.urgent) == (current(api), "device", True)
        report = api.context.registry.record(NAME).version.report["selftest"]
        assert report["tested_version"] == f"sha256:{tested}" and "skipped" in report


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (scaled_files(1), scaled_files(3)),  # larger numbers may overflow
        (scaled_files(0), scaled_files(0.5)),  # a test of zeros proves nothing
        (scaled_files(1), scaled_files(1, lora_alpha=8)),  # another scale
        (scaled_files(1), scaled_files(1, r=4)),  # other shapes
        (scaled_files(1), scaled_files(1, target_modules=["q_proj"])),  # other modules
    ],
    ids=["larger", "after zeros", "scale", "rank", "modules"],
)
async def test_other_versions_are_tested(
    first: Files, second: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        messages = sent(api, monkeypatch)
        assert await publish(api, first, messages) == ["RunSelfTest"]
        assert await publish(api, second, messages) == ["RunSelfTest"]


async def test_a_refused_version_vouches_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        messages = sent(api, monkeypatch)
        api.engine.selftest, good = SelfTest(0.5, 0.1, 1e-3), api.engine.selftest
        files = {name: (name, data) for name, data in scaled_files(1).items()}
        assert (await api.http.post("/v1/adapters", data={"name": NAME}, files=files)).status_code == 422
        api.engine.selftest = good
        assert await publish(api, scaled_files(1.5), messages) == ["RunSelfTest"]


async def test_numbers_are_still_checked(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload(NAME)
        files = {name: (name, data) for name, data in scaled_files(float("nan")).items()}
        response = await api.http.post("/v1/adapters", data={"name": NAME, "replace": "true"}, files=files)
        assert response.status_code == 422 and "nonfinite" in response.text


async def test_a_dry_run_tests_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        messages = sent(api, monkeypatch)
        await publish(api, scaled_files(1), messages)
        assert await publish(api, scaled_files(1.5), messages, dry_run="true") == ["RunSelfTest"]

"""Requests that meet an adapter which is damaged, deleted or made for another base model get clear responses."""

import asyncio
import json
from pathlib import Path

import pytest

from server.ipc.messages import ResidencyReport
from tests.fixtures.api_server import BASE, Api, adapter_files, assert_error, events, serving
from tests.fixtures.timing import eventually


def mark(api: Api, name: str) -> str:
    registry = api.context.registry
    digest = registry.record(name).version.digest
    registry.note_check(digest, "its stored files are damaged", registry.store.signature(digest))
    return digest


@pytest.mark.reliability("T13")
async def test_a_damaged_adapter_is_named_with_its_state(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        mark(api, "acme")
        error = assert_error(await api.chat(model="acme"), 503, "adapter_failed")
        assert "'acme'" in error["message"] and "failed" in error["message"] and "damaged" in error["message"]
        assert_error(await api.complete(model="acme"), 503, "adapter_failed")
        assert_error(await api.chat(adapters=[{"name": "acme", "scale": 1}]), 503, "adapter_failed")
        assert_error(await api.chat(model="none"), 404, "model_not_found")
        await api.upload("acme")
        assert (await api.chat(model="acme")).status_code == 200


@pytest.mark.reliability("T34")
async def test_an_alias_says_nothing_of_its_damaged_member(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        api.context.registry.split("prod", {"acme": 1})
        mark(api, "acme")
        assert "acme" not in assert_error(await api.chat(model="prod"), 503, "adapter_failed")["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_cannot_be_loaded_is_no_internal_error(stream: bool, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        digest = api.context.registry.record("acme").version.digest
        api.context.engine.residency = ResidencyReport(failed={digest: "content 123 instead of 456"})
        api.engine.fail_after, api.engine.failure = 0, "the adapter could not be loaded: content 123 instead of 456"
        error = assert_error(await api.chat(model="acme", stream=stream), 503, "adapter_failed")
        assert "content 123 instead of 456" in error["message"]
        assert_error(await api.chat(model=BASE), 500, "engine_error")


async def test_a_stream_of_a_deleted_adapter_ends_as_if_it_did_not_exist(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        api.waits_after(1)
        streaming = asyncio.create_task(api.chat(model="acme", stream=True))
        whole = asyncio.create_task(api.complete(model="acme"))
        await eventually(lambda: api.generated == 2)
        assert (await api.http.delete("/v1/adapters/acme?drain_timeout=0")).json()["aborted"] == 2
        error = events(await streaming)[-1]["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model") and "deleted" in error["message"]
        assert_error(await whole, 404, "model_not_found")


@pytest.mark.parametrize(
    ("named", "reported"),
    [
        ("meta-llama/Llama-3.1-8B", True),
        ("org/tiny-base", False),
        ("/models/Tiny-Base/", False),
        ("C:\\models\\tiny-base", False),
        ("", False),
        (None, False),
        ("x" * 1000, True),
    ],
)
async def test_another_base_model_is_in_the_report(named: str | None, reported: bool, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        config = json.loads(adapter_files()["adapter_config.json"]) | {"base_model_name_or_path": named}
        files = adapter_files() | {"adapter_config.json": json.dumps(config).encode()}
        form = {name: (name, data) for name, data in files.items()}
        answer = await api.http.post("/v1/adapters", data={"name": "acme"}, files=form)
        assert answer.status_code == 201
        expected = {"base_model_name_or_path": (named or "")[:200], "served": BASE} if reported else None
        assert answer.json()["report"].get("trained_on") == expected

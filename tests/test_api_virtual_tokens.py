"""Requests for adapters of virtual tokens: what reaches the engine, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from adapters.registry.registry import AdapterRecord
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.api_server import MAX_MODEL_LEN, Api, assert_error, serving
from tests.fixtures.virtual_tokens import write_virtual

TOKENS = 21


async def upload(api: Api, folder: Path, name: str, kind: str, tokens: int = TOKENS, seed: int = 0) -> dict[str, Any]:
    written = write_virtual(tiny_llama(vocab_size=300), folder / f"{name} {seed}", kind, tokens, seed)
    files = {
        file: (file, (written / file).read_bytes()) for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    response = await api.http.post("/v1/adapters", data={"name": name, "replace": "true"}, files=files)
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(("kind", "has_prefix"), [("P_TUNING", False), ("CARTRIDGE", True)])
async def test_the_engine_is_told_of_virtual_tokens_and_usage_is_not(
    tmp_path: Path, kind: str, has_prefix: bool
) -> None:
    async with serving(tmp_path) as api:
        report = (await upload(api, tmp_path, "one", kind))["report"]
        assert report["features"] == [kind.lower()] and report["traits"]["virtual_tokens"] == TOKENS
        answer = await api.complete("hello", model="one")
        assert answer.json()["usage"]["prompt_tokens"] == 5
        (submit,) = api.engine.submitted
        assert (submit.virtual_tokens, submit.has_prefix, len(submit.token_ids)) == (TOKENS, has_prefix, 5)


async def test_virtual_tokens_take_a_part_of_the_context(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload(api, tmp_path, "one", "CARTRIDGE", 200)
        left = MAX_MODEL_LEN - 200
        assert (await api.complete("x" * (left - 6), model="one", max_tokens=6)).status_code == 200
        await api.chat("hi", model="one")
        assert api.engine.submitted[-1].sampling.max_tokens == left - len(api.engine.submitted[-1].token_ids)
        refused = assert_error(
            await api.complete("x" * left, model="one", max_tokens=1), 400, "context_length_exceeded"
        )
        assert "200 virtual tokens of the adapter" in refused["message"]
        assert_error(await api.complete("x" * (left - 6), model="one", max_tokens=7), 400, "context_length_exceeded")


async def test_an_adapter_larger_than_the_context_is_refused_in_a_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload(api, tmp_path, "one", "CARTRIDGE", MAX_MODEL_LEN + 1)
        refused = assert_error(await api.complete("x", model="one"), 400, "context_length_exceeded")
        assert f"{MAX_MODEL_LEN + 1} virtual tokens of the adapter" in refused["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "one", "adapter_scale": 0.5},
        {"adapters": [{"name": "one"}, {"name": "two"}]},
        {"adapters": [{"name": "one", "scale": 2}]},
    ],
)
async def test_they_are_not_scaled_or_combined(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as api:
        await upload(api, tmp_path, "one", "PROMPT_TUNING")
        assert (await api.upload("two")).status_code == 201
        refused = assert_error(await api.complete("x", **fields), 400)
        assert "'one' cannot be" in refused["message"] and "virtual tokens" in refused["message"]


async def test_they_are_not_merged(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload(api, tmp_path, "one", "CPT")
        refused = assert_error(await api.http.post("/v1/merge", json={"name": "one"}), 409, "conflict")
        assert "virtual tokens in front of the prompt" in refused["message"]


async def test_a_new_version_serves_the_next_request(tmp_path: Path) -> None:
    """With another number of virtual tokens; a restart reads the number from the registry."""
    async with serving(tmp_path) as api:
        await upload(api, tmp_path, "one", "PROMPT_TUNING", 5)
        await api.complete("x", model="one")
        await upload(api, tmp_path, "one", "CARTRIDGE", 7, seed=1)
        await api.complete("x", model="one")
        assert [(s.virtual_tokens, s.has_prefix) for s in api.engine.submitted] == [(5, False), (7, True)]
    async with serving(tmp_path) as api:
        record = api.context.registry.resolve("one")
        assert isinstance(record, AdapterRecord) and record.version.traits.virtual_tokens == 7
        await api.complete("x", model="one")
        assert [(s.virtual_tokens, s.has_prefix) for s in api.engine.submitted] == [(7, True)]

"""Running requests when their adapter is replaced, and pauses, over HTTP."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.api_server import Api, adapter_files, form, serving, tokenizer_files
from tests.fixtures.timing import eventually

NAME = "policy"
Answer = asyncio.Task[httpx.Response]


async def started(api: Api, model: str = NAME, **fields: Any) -> Answer:
    """A request that has said two tokens and waits."""
    api.says("abcdefgh", end=False)
    api.waits_after(2)
    before = api.generated
    body = {"model": model, "prompt": "hi", "max_tokens": 4, "return_token_ids": True, **fields}
    answer = asyncio.create_task(api.http.post("/v1/completions", json=body))
    await eventually(lambda: api.generated == before + 2 * fields.get("n", 1))
    return answer


async def version(api: Api, seed: int, **fields: Any) -> str:
    response = await api.upload(NAME, seed, replace="true", **fields)
    response.raise_for_status()
    label: str = response.json()["version"].removeprefix("sha256:")[:12]
    return label


async def ended(api: Api, answer: Answer) -> dict[str, Any]:
    api.goes_on()
    response = await answer
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def test_running_requests_finish_on_their_version(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        old = await version(api, 0)
        answer = await started(api)
        await version(api, 1)
        choice = await ended(api, answer)
        assert (choice["finish_reason"], choice["token_versions"]) == ("length", [old] * 4)
        assert api.engine.switched == {} and api.engine.aborted == []


async def by_form(api: Api) -> httpx.Response:
    return await api.http.post(
        "/v1/adapters", data={"name": NAME, "replace": "true", "in_flight": "switch"}, files=form(1)
    )


async def by_source(api: Api) -> httpx.Response:
    body = {"name": NAME, "source": allowed(api).as_uri(), "replace": True, "in_flight": "switch"}
    return await api.http.post("/v1/adapters", json=body)


async def as_vllm(api: Api) -> httpx.Response:
    body = {"lora_name": NAME, "lora_path": str(allowed(api)), "load_inplace": True, "in_flight": "switch"}
    return await api.http.post("/v1/load_lora_adapter", json=body)


def allowed(api: Api) -> Path:
    folder = Path(api.context.config.allow_source[0].removeprefix("file://"))
    folder.mkdir(exist_ok=True)
    for name, data in adapter_files(1).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("door", [by_form, by_source, as_vllm])
async def test_running_requests_switch(door: Callable[[Api], Awaitable[httpx.Response]], tmp_path: Path) -> None:
    async with serving(tmp_path, allow_source=(f"file://{tmp_path}/allowed",)) as api:
        old = await version(api, 0)
        answer, other = await started(api), await started(api, f"{NAME}@{old}")
        (await door(api)).raise_for_status()
        new = api.context.registry.resolve(NAME).version.digest
        assert new in api.context.in_flight.digests()
        choice = await ended(api, answer)
        assert choice["token_versions"] == [old, old, new[:12], new[:12]] and len(choice["token_ids"]) == 4
        assert (await ended(api, other))["token_versions"] == [old] * 4  # it named its version


async def test_each_event_of_a_stream_has_the_versions_of_its_tokens(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        old = await version(api, 0)
        answer = await started(api, stream=True)
        new = await version(api, 1, in_flight="switch")
        api.goes_on()
        lines = [line[6:] for line in (await answer).text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        assert all(len(choice["token_ids"]) == len(choice["token_versions"]) for choice in choices)
        assert [label for choice in choices for label in choice["token_versions"]] == [old, old, new, new]


async def test_running_requests_end_with_what_they_have(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        old = await version(api, 0)
        answer, base = await started(api), await started(api, api.context.base_model)
        await version(api, 1, in_flight="abort")
        choice = await ended(api, answer)
        assert (choice["finish_reason"], choice["text"], choice["token_versions"]) == ("abort", "ab", [old] * 2)
        assert (await ended(api, base))["token_versions"] == ["base"] * 4


async def test_a_version_of_another_vocabulary_takes_no_running_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        old = await version(api, 0)
        fields = {"name": NAME, "replace": "true", "in_flight": "switch"}
        beside = {name: (name, data) for name, data in tokenizer_files().items() if name.startswith("tokenizer")}
        response = await api.http.post("/v1/adapters", data=fields, files=form(1) | beside)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict"), response.text
        assert api.context.registry.resolve(NAME).version.digest.startswith(old)


async def test_what_is_fetched_later_moves_no_requests(tmp_path: Path) -> None:
    async with serving(tmp_path, allow_source=(f"file://{tmp_path}/allowed",)) as api:
        body = {"name": NAME, "source": allowed(api).as_uri(), "lazy": True, "in_flight": "switch"}
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 400


async def test_pause_and_resume(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.get("/is_paused")).json() == {"is_paused": False}
        assert (await api.http.post("/pause?mode=keep")).json() == {"status": "paused"}
        assert (await api.http.get("/is_paused")).json() == {"is_paused": True}
        assert (await api.http.post("/resume")).json() == {"status": "resumed"}
        assert (await api.http.get("/is_paused")).json() == {"is_paused": False}
        assert (await api.http.post("/pause?mode=later")).status_code == 400


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", ["Pause abort", "ResetPrefixCache"]),
        ("?mode=keep", ["Pause keep"]),
        ("?mode=wait&clear_cache=false", ["Pause wait"]),
        ("?wait_for_inflight_requests=true", ["Pause wait", "ResetPrefixCache"]),
    ],
)
async def test_a_pause_empties_the_prefix_cache_as_vllm_does(query: str, asked: list[str], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        (await api.http.post(f"/pause{query}")).raise_for_status()
        found = [f"{type(each).__name__} {getattr(each, 'mode', '')}".strip() for each in api.engine.interruptions]
        assert found == asked


async def test_the_prefix_cache_can_be_emptied(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.post("/reset_prefix_cache")).json() == {"success": True}
        assert [type(each).__name__ for each in api.engine.interruptions] == ["ResetPrefixCache"]


async def test_a_pause_survives_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.http.post("/pause?mode=wait")
        api.engine.interruptions.clear()
        api.engine.die()
        await eventually(lambda: api.context.engine.restarts == 1 and api.context.ready)
        assert [getattr(each, "mode", None) for each in api.engine.interruptions] == ["keep"]


async def test_log_probabilities_are_as_many_as_token_ids(tmp_path: Path) -> None:
    """The token that ended the output has no text, and a trainer needs its log-probability all the same. So does
    lm-evaluation-harness, which drops the last one behind an echoed prompt of two tokens, whatever it is."""
    async with serving(tmp_path) as api:
        api.says("abc")
        for tokens, fields in ((3, {}), (4, {"return_token_ids": True}), (6, {"echo": True})):
            choice = (await api.complete(logprobs=1, max_tokens=9, **fields)).json()["choices"][0]
            assert len(choice["logprobs"]["tokens"]) == tokens and choice["text"].endswith("abc")
        body = {"logprobs": True, "return_token_ids": True}
        choice = (await api.chat(**body)).json()["choices"][0]
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == 4


async def test_the_mode_of_log_probabilities_reaches_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for mode in (None, "raw_logprobs", "processed_logprobs"):
            assert (await api.complete(logprobs=1, logprobs_mode=mode)).status_code == 200
        assert [submit.sampling.processed_logprobs for submit in api.engine.submitted] == [False, False, True]
        assert (await api.complete(logprobs=1, logprobs_mode="raw_logits")).status_code == 400

"""`/generate` and `/generate_stream` in the format of LoRAX, as completions."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.api_server import Api, serving


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path) as found:
        await found.upload("own")
        yield found


async def send(api: Api, path: str = "/generate", **parameters: Any) -> httpx.Response:
    return await api.http.post(path, json={"inputs": "hi ", "parameters": parameters})


def lorax_error(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status and answer.json()["error_type"] == kind, answer.text
    message: str = answer.json()["error"]
    return message


async def test_a_text(api: Api) -> None:
    assert (await send(api, max_new_tokens=20)).json() == {"generated_text": "Hello world", "details": None}
    assert api.engine.submitted[-1].sampling.temperature == 0 and not api.engine.submitted[-1].adapters
    assert (await api.http.post("/generate", json={"inputs": "x"})).status_code == 200
    assert (await send(api, return_full_text=True, max_new_tokens=20)).json()["generated_text"] == "hi Hello world"


async def test_parameters_are_those_of_a_completion(api: Api) -> None:
    answer = await send(
        api, adapter_id="own", max_new_tokens=20, top_k=5, seed=3, stop=["wor"], details=True, brand_new=1
    )
    assert answer.headers["x-loraplex-ignored"] == "parameters.brand_new"
    submitted, details = api.engine.submitted[-1], answer.json()["details"]
    assert submitted.adapters and (submitted.sampling.top_k, submitted.sampling.temperature) == (5, 1)
    assert (details["finish_reason"], details["seed"], details["prompt_tokens"]) == ("stop_sequence", 3, 3)
    assert "".join(token["text"] for token in details["tokens"]) == answer.json()["generated_text"] == "Hello "
    assert (await send(api, max_new_tokens=2, details=True)).json()["details"]["finish_reason"] == "length"
    await send(api, do_sample=False, temperature=0.5)
    assert api.engine.submitted[-1].sampling.temperature == 0


async def test_a_stream(api: Api) -> None:
    answer = await send(api, "/generate_stream", max_new_tokens=20)
    events = [json.loads(frame.removeprefix("data: ")) for frame in answer.text.split("\n\n")[:-1]]
    assert "".join(event["token"]["text"] for event in events) == "Hello world"
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "Hello world"
    assert events[-1]["details"]["finish_reason"] == "eos_token" and events[-1]["details"]["generated_tokens"] == 12


async def test_errors_have_lorax_s_shape(api: Api) -> None:
    assert "nope" in lorax_error(await send(api, adapter_id="nope"), 404, "validation")
    for fields in ({"merged_adapters": {}}, {"adapter_source": "hub"}, {"temperature": 9}, {"max_new_tokens": "x"}):
        assert next(iter(fields)) in lorax_error(await send(api, **fields), 400, "validation")
    for name in ("adapter_id", "lora_path", "model", "adapters"):
        answer = await api.http.post("/generate", json={"inputs": "x", name: "own"})
        assert f"{name}: " in lorax_error(answer, 400, "validation")
    assert not api.engine.submitted
    api.engine.fail_after = 3
    assert '"error_type":"generation"' in (await send(api, "/generate_stream")).text

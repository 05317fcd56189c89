"""OpenAI's Responses API: what a request means as a chat, and the items and events of its response."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.fields import REFUSED_IN_RESPONSES
from tests.fixtures.api_server import BASE, Api, assert_error, byte_tokenizer, last_prompt, serving, typed_events

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}|{% endfor %}{{ reasoning_effort }}{# <tool_call> </think> #}"
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.reasoning_content }} {{ m.content }}"
    "{% for call in m.tool_calls %}[{{ call.id }} {{ call.function.arguments.city }}]{% endfor %}{{ m.tool_call_id }}"
    "{% endfor %}"
)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
OUTPUT = '<think>Hm.</think>So: <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, tokenizer=byte_tokenizer(TEMPLATE)) as found:
        await found.upload("own")
        yield found


async def send(api: Api, **fields: Any) -> httpx.Response:
    return await api.http.post("/v1/responses", json={"model": BASE, "input": "hi", **fields})


def frames(answer: httpx.Response) -> list[dict[str, Any]]:
    found = typed_events(answer)
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    return found


async def test_a_conversation_reaches_the_template(api: Api) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "So"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    ]
    answer = await send(
        api, input=items, instructions="S", tools=[TOOL], reasoning={"effort": "low", "summary": "auto"}
    )
    assert answer.status_code == 200 and "x-loraplex-ignored" not in answer.headers
    assert last_prompt(api) == (
        "weather|low<|start|>system  S<|start|>user  hi<|start|>assistant Hm So[c1 Rome]<|start|>tool  sunc1"
    )
    assert answer.json()["reasoning"]["effort"] == "low" and answer.json()["instructions"] == "S"


async def test_items_and_events(api: Api) -> None:
    api.says(OUTPUT)
    body = (await send(api, tools=[TOOL])).json()
    reasoning, message, call = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"] == [{"type": "output_text", "text": "So:", "annotations": [], "logprobs": []}]
    assert (call["name"], call["arguments"], call["status"]) == ("weather", '{"city": "Paris"}', "completed")
    events = frames(await send(api, tools=[TOOL], stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    unique = events[0]["response"]["id"].removeprefix("resp_")
    streamed = json.loads(
        json.dumps(events[-1]["response"]["output"]).replace(unique, body["id"].removeprefix("resp_"))
    )
    assert [{**item, "call_id": ""} for item in streamed] == [{**item, "call_id": ""} for item in body["output"]]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    for name, text in (
        ("output_text", "So:"),
        ("reasoning_text", "Hm."),
        ("function_call_arguments", call["arguments"]),
    ):
        deltas = [event["delta"] for event in events if event["type"] == f"response.{name}.delta"]
        assert "".join(deltas) == text


async def test_a_response_that_is_cut_off_is_incomplete(api: Api) -> None:
    body = (await send(api, max_output_tokens=3)).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete" and body["output"][0]["content"][0]["text"] == "Hel"
    assert frames(await send(api, max_output_tokens=3, stream=True))[-1]["type"] == "response.incomplete"


async def test_adapters_are_chosen_as_in_a_chat(api: Api) -> None:
    for fields in ({"model": "own"}, {"adapter_id": "own"}, {"adapters": [{"name": "own"}]}):
        assert (await send(api, **fields)).status_code == 200 and api.engine.submitted[-1].adapters
    assert_error(await send(api, model="nope"), 404, "model_not_found")


async def test_what_is_not_applied_is_named(api: Api) -> None:
    for name in REFUSED_IN_RESPONSES:
        assert assert_error(await send(api, **{name: "x"}), 400, "unsupported")["param"] == name
        for value in (None, *REFUSED_IN_RESPONSES[name].neutral):
            assert (await send(api, **{name: value})).status_code == 200
    strict = await send(api, tools=[{**TOOL, "strict": True}], store=True, brand_new=1, metadata={"a": "b"})
    assert strict.headers["x-loraplex-ignored"] == "brand_new, tools.0.strict" and strict.json()["metadata"] == {
        "a": "b"
    }
    for fields, param in (
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, None),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, None),
        ({"best_of": 2}, "best_of"),
    ):
        error = assert_error(await send(api, **fields), 400)
        assert param in (None, error["param"]), error
    api.engine.fail_after = 3
    failed = frames(await send(api, stream=True))[-1]
    assert failed["type"] == "response.failed" and failed["response"]["error"]["message"]


async def test_constraints_are_those_of_a_chat(api: Api) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    named = {"type": "json_schema", "name": "point", "schema": schema, "strict": True}
    for fields in (
        {"text": {"format": named}},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
    ):
        body = await send(api, **fields)
        assert body.status_code == 200, body.text
        assert "x-loraplex-ignored" not in body.headers
        assert api.engine.submitted[-1].sampling.constraint is not None
    assert body.json()["tool_choice"] == {"type": "function", "name": "weather"}
    assert (await send(api, text={"format": named})).json()["text"]["format"]["schema"] == schema


LOGPROBS = "message.output_text.logprobs"


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path / "plain", tokenizer=byte_tokenizer()) as found:
        yield found


async def test_log_probabilities_of_the_text(plain: Api) -> None:
    body = (await send(plain, include=[LOGPROBS], top_logprobs=2)).json()
    scores = body["output"][0]["content"][0]["logprobs"]
    assert "".join(score["token"] for score in scores) == "Hello world"
    assert all(len(score["top_logprobs"]) == 2 and score["logprob"] <= 0 for score in scores)
    events = frames(await send(plain, include=[LOGPROBS], top_logprobs=2, stream=True))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [score for delta in deltas for score in delta["logprobs"]] == scores
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == scores
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == scores
    for fields in ({}, {"include": []}, {"include": ["reasoning.encrypted_content"], "top_logprobs": 0}):
        assert (await send(plain, **fields)).json()["output"][0]["content"][0]["logprobs"] == []


async def test_log_probabilities_that_have_no_place_are_refused(plain: Api, api: Api) -> None:
    assert "top_logprobs" in assert_error(await send(plain, top_logprobs=2), 400)["message"]
    assert assert_error(await send(plain, include=["file_search_call.results"]), 400)["param"] == "include.0"
    refused = assert_error(await send(api, include=[LOGPROBS], tools=[TOOL]), 400, "unsupported")
    assert refused["param"] == "include" and "/v1/chat/completions" in refused["message"]

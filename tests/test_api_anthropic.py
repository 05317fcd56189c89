"""Anthropic's Messages API: translated to a chat, and back to the bodies and events that Anthropic's client reads."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.middleware.auth import ALL_SCOPES, Key, KeyRing
from server.keys_file import digest_of
from tests.fixtures.api_server import BASE, Api, byte_tokenizer, last_prompt, secret, serving, typed_events

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}|{% endfor %}{{ enable_thinking }}{# <tool_call> </think> #}"
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}{% for call in m.tool_calls %}"
    "[{{ call.id }} {{ call.function.arguments.city }}]{% endfor %}{{ m.tool_call_id }}"
    "{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}{% endfor %}"
)
TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
OUTPUT = '<think>Hm.</think>Look: <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
USAGE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 4}
BLOCKS = [
    {"type": "thinking", "thinking": "Hm.", "signature": ""},
    {"type": "text", "text": "Look:"},
    {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}},
]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, tokenizer=byte_tokenizer(TEMPLATE)) as found:
        await found.upload("own")
        yield found


async def send(api: Api, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **fields}
    return await api.http.post("/v1/messages", json=body)


def anthropic_error(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["type"] == "error" and body["error"]["type"] == kind
    message: str = body["error"]["message"]
    return message


def without_id(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "id"}


async def test_a_message(api: Api) -> None:
    answer = await send(api)
    body = answer.json()
    assert body.pop("id").startswith("msg_")
    assert body.pop("usage") == {
        "input_tokens": len(api.engine.submitted[-1].token_ids) - 4,
        "output_tokens": 12,
        **USAGE,
    }
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": BASE,
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }


async def test_blocks_of_a_body_and_of_a_stream(api: Api) -> None:
    api.says(OUTPUT)
    body = (await send(api, tools=[TOOL], max_tokens=200)).json()
    assert body["stop_reason"] == "tool_use" and [without_id(block) for block in body["content"]] == BLOCKS
    events = typed_events(await send(api, tools=[TOOL], max_tokens=200, stream=True))
    first, *middle, delta, last = events
    assert first["type"] == "message_start" and first["message"]["content"] == []
    assert first["message"]["stop_reason"] is None and first["message"]["usage"]["input_tokens"] > 0
    assert (delta["type"], last) == ("message_delta", {"type": "message_stop"})
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == body["usage"]["output_tokens"]
    assert [without_id(block) for block in put_together(middle)] == BLOCKS


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream, as Anthropic's client accumulates them. One is open at a time."""
    blocks: list[dict[str, Any]] = []
    parts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            parts = []
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            kind = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            parts.append(event["delta"][kind[event["delta"]["type"]]])
        else:
            assert event == {"type": "content_block_stop", "index": len(blocks) - 1}
            block = blocks[-1]
            key = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
            block[key] = json.loads("".join(parts)) if key == "input" else "".join(parts)
    return blocks


async def test_a_conversation_reaches_the_template(api: Api) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    answer = await send(api, system="S", messages=messages, tools=[TOOL], thinking={"type": "disabled"})
    assert "x-loraplex-ignored" not in answer.headers
    assert last_prompt(api) == (
        "weather|False<|start|>system S<|end|><|start|>user hi<|end|><|start|>assistant [t1 Rome]<|end|>"
        "<|start|>tool sunt1<|end|><|start|>user so?<|end|>"
    )
    await send(api, messages=[*messages[:1], {"role": "assistant", "content": "So"}])
    assert last_prompt(api).endswith("<|start|>assistant So")


async def test_fields_are_those_of_a_chat(api: Api) -> None:
    answer = await send(
        api, model="own", stop_sequences=["wor"], top_k=5, temperature=0.5, metadata={"user_id": "u"}, brand_new=1
    )
    assert answer.headers["x-loraplex-ignored"] == "brand_new"
    body, submitted = answer.json(), api.engine.submitted[-1]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "wor")
    assert body["content"] == [{"type": "text", "text": "Hello "}] and submitted.adapters
    assert (submitted.sampling.top_k, submitted.sampling.temperature) == (5, 0.5)
    assert (await send(api, max_tokens=3)).json()["stop_reason"] == "max_tokens"
    assert (await send(api, adapter_id="own")).json()["model"] == "own"


async def test_errors_have_anthropic_s_shape(api: Api, tmp_path: Path) -> None:
    anthropic_error(await send(api, model="nope"), 404, "not_found_error")
    assert "max_tokens" in anthropic_error(await send(api, max_tokens=None), 400, "invalid_request_error")
    for fields, name in (
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "content"),
        ({"temperature": 9}, "temperature"),
        ({"best_of": 2}, "best_of"),
        ({"chat_template_kwargs": 5, "thinking": {"type": "enabled"}}, "chat_template_kwargs"),
    ):
        assert name in anthropic_error(await send(api, **fields), 400, "invalid_request_error")
    api.engine.fail_after = 3
    assert typed_events(await send(api, stream=True))[-1]["error"]["type"] == "api_error"
    keys = KeyRing([Key("k", digest_of(secret("k")), ALL_SCOPES)])
    async with serving(tmp_path / "closed", keys=keys) as closed:
        anthropic_error(await send(closed), 401, "authentication_error")
        closed.http.headers["x-api-key"] = secret("k")
        assert (await send(closed)).status_code == 200


async def test_the_output_follows_a_schema(api: Api) -> None:
    """As Anthropic's client sends it for `messages.parse`, and as it did before."""
    output_format = {"type": "json_schema", "schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    for fields in ({"output_config": {"format": output_format, "effort": "low"}}, {"output_format": output_format}):
        answer = await send(api, **fields)
        assert answer.status_code == 200, answer.text
        assert "x-loraplex-ignored" not in answer.headers
        assert api.engine.submitted[-1].sampling.constraint is not None
    for broken in ({"type": "regex"}, {"type": "json_schema"}, {"type": "json_schema", "schema": {"not": {}}}):
        assert (await send(api, output_config={"format": broken})).status_code == 400
    assert (await send(api, output_config={"format": None, "effort": None})).status_code == 200
    assert api.engine.submitted[-1].sampling.constraint is None

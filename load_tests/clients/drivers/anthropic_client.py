"""Anthropic's Python client."""

from typing import Any

from anthropic import Anthropic
from driver import (
    FUNCTION,
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    PERSON_QUESTION,
    QUESTION,
    URL,
    WEATHER,
    WEATHER_QUESTION,
    Person,
    call,
    report,
)

messages = Anthropic(base_url=URL, api_key=KEY, max_retries=0).messages
COMMON: dict[str, Any] = {"model": MODEL, "extra_body": {"temperature": 0}}  # the client has no such parameter
TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}


def chat() -> Any:
    return _text(messages.create(messages=QUESTION, max_tokens=MAX_TOKENS, **COMMON))


def _text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def stream() -> Any:
    with messages.stream(messages=QUESTION, max_tokens=MAX_TOKENS, **COMMON) as events:
        return {"deltas": list(events.text_stream)}


def tools() -> Any:
    options = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": WEATHER["name"]}, "max_tokens": JSON_TOKENS}
    message = messages.create(messages=WEATHER_QUESTION, **options, **COMMON)
    with messages.stream(messages=WEATHER_QUESTION, **options, **COMMON) as events:
        streamed = events.get_final_message()
    return {"calls": _calls(message), "streamed": _calls(streamed), "answer": _answer(message)}


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call(block.name, block.input) for block in message.content if block.type == "tool_use"]


def _answer(message: Any) -> str:
    used = next(block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": used.id, "content": WEATHER["result"]}
    history = [
        *WEATHER_QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    options = {"tools": [TOOL], "tool_choice": {"type": "none"}, "max_tokens": MAX_TOKENS}
    return _text(messages.create(messages=history, **options, **COMMON))


def json_schema() -> Any:
    message = messages.parse(messages=PERSON_QUESTION, max_tokens=JSON_TOKENS, output_format=Person, **COMMON)
    return message.parsed_output.model_dump()


report(
    {
        "embeddings": "Anthropic's API has none",
        "logprobs": "Anthropic's API has none",
    },
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
)

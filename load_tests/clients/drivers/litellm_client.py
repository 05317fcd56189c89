"""LiteLLM's Python functions."""

import json
from typing import Any

import litellm
from driver import (
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    NAMED,
    PERSON_FORMAT,
    PERSON_QUESTION,
    QUESTION,
    TEXTS,
    TOOL,
    URL,
    WEATHER,
    WEATHER_QUESTION,
    call,
    report,
)

SERVER: dict[str, Any] = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0}


def complete(messages: Any, max_tokens: int = MAX_TOKENS, **options: Any) -> Any:
    return litellm.completion(messages=messages, max_tokens=max_tokens, temperature=0, **options, **SERVER)


def chat() -> Any:
    return complete(QUESTION).choices[0].message.content


def stream() -> Any:
    return {"deltas": [chunk.choices[0].delta.content or "" for chunk in complete(QUESTION, stream=True)]}


def tools() -> Any:
    options = {"tools": [TOOL], "tool_choice": NAMED}
    message = complete(WEATHER_QUESTION, JSON_TOKENS, **options).choices[0].message
    chunks = list(complete(WEATHER_QUESTION, JSON_TOKENS, stream=True, **options))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": WEATHER["result"]}
    answer = complete([*WEATHER_QUESTION, message, result], tools=[TOOL], tool_choice="none")
    return {
        "calls": _calls(message),
        "streamed": _calls(streamed),
        "answer": answer.choices[0].message.content,
    }


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call(each.function.name, each.function.arguments) for each in message.tool_calls]


def json_schema() -> Any:
    response = complete(PERSON_QUESTION, JSON_TOKENS, response_format=PERSON_FORMAT)
    return json.loads(response.choices[0].message.content)


def embeddings() -> Any:
    return [item["embedding"] for item in litellm.embedding(input=TEXTS, **SERVER).data]


def logprobs() -> Any:
    choice = complete(QUESTION, logprobs=True, top_logprobs=2).choices[0]
    return [token["logprob"] for token in choice.logprobs["content"]]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)

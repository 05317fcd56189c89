"""Instructor over OpenAI's client."""

from typing import Any

import instructor
from driver import (
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
    Weather,
    call,
    report,
)
from openai import OpenAI

SERVER = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


def create(mode: instructor.Mode, messages: Any, max_tokens: int = MAX_TOKENS, **options: Any) -> Any:
    client = instructor.from_openai(SERVER, mode=mode)
    common = {"model": MODEL, "temperature": 0, "max_tokens": max_tokens, "max_retries": 1}
    return client.chat.completions.create(messages=messages, **common, **options)


def chat() -> Any:
    return create(instructor.Mode.TOOLS, QUESTION, response_model=None).choices[0].message.content


def stream() -> Any:
    chunks = create(instructor.Mode.TOOLS, QUESTION, response_model=None, stream=True)
    return {"deltas": [chunk.choices[0].delta.content or "" for chunk in chunks]}


def tools() -> Any:
    function = type(WEATHER["name"], (Weather,), {"__doc__": WEATHER["description"]})
    found = create(instructor.Mode.TOOLS, WEATHER_QUESTION, JSON_TOKENS, response_model=function)
    partial = instructor.Partial[function]
    *_, streamed = create(instructor.Mode.TOOLS, WEATHER_QUESTION, JSON_TOKENS, response_model=partial, stream=True)
    return {
        "calls": [call(type(found).__name__, found.model_dump())],
        "streamed": [call(WEATHER["name"], streamed.model_dump())],
    }


def json_schema() -> Any:
    return create(instructor.Mode.JSON_SCHEMA, PERSON_QUESTION, JSON_TOKENS, response_model=Person).model_dump()


def logprobs() -> Any:
    response = create(instructor.Mode.TOOLS, QUESTION, response_model=None, logprobs=True, top_logprobs=2)
    return [token.logprob for token in response.choices[0].logprobs.content]


report(
    {"embeddings": "Instructor wraps chats alone"},
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    logprobs=logprobs,
)

"""OpenAI's Python client, Responses API."""

from typing import Any

from driver import (
    FUNCTION,
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    PERSON,
    TASK,
    URL,
    WEATHER,
    Person,
    call,
    report,
)
from openai import OpenAI

responses = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0).responses
COMMON: dict[str, Any] = {"model": MODEL, "temperature": 0}


def chat() -> Any:
    return responses.create(input=TASK["question"], max_output_tokens=MAX_TOKENS, **COMMON).output_text


def stream() -> Any:
    with responses.stream(input=TASK["question"], max_output_tokens=MAX_TOKENS, **COMMON) as events:
        return {"deltas": [event.delta for event in events if event.type == "response.output_text.delta"]}


def tools() -> Any:
    offered = {"tools": [{"type": "function", "strict": True, **FUNCTION}], "max_output_tokens": JSON_TOKENS, **COMMON}
    question = {"role": "user", "content": WEATHER["question"]}
    chosen = {"type": "function", "name": WEATHER["name"]}
    response = responses.create(input=[question], tool_choice=chosen, **offered)
    with responses.stream(input=[question], tool_choice=chosen, **offered) as events:
        events.until_done()
        streamed = events.get_final_response()
    made = [item for item in response.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": made[0].call_id, "output": WEATHER["result"]}
    history = [question, *(item.to_dict() for item in response.output), result]
    answer = responses.create(input=history, tool_choice="none", **offered)
    return {"calls": _calls(response), "streamed": _calls(streamed), "answer": answer.output_text}


def _calls(response: Any) -> list[dict[str, Any]]:
    return [call(item.name, item.arguments) for item in response.output if item.type == "function_call"]


def json_schema() -> Any:
    options = {"text_format": Person, "max_output_tokens": JSON_TOKENS, **COMMON}
    return responses.parse(input=PERSON["question"], **options).output_parsed.model_dump()


def logprobs() -> Any:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": MAX_TOKENS}
    response = responses.create(input=TASK["question"], **options, **COMMON)
    return [token.logprob for item in response.output for part in item.content for token in part.logprobs]


report(
    {"embeddings": "the Responses API has no embeddings"},
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    logprobs=logprobs,
)

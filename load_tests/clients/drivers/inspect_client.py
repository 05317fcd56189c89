"""Inspect's models, as evaluations use them."""

import asyncio
from typing import Any

from driver import (
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
from inspect_ai.model import ChatMessageTool, ChatMessageUser, GenerateConfig, ModelOutput, ResponseSchema, get_model
from inspect_ai.tool import ToolFunction, ToolInfo, ToolParams
from inspect_ai.util import json_schema as schema_of


def generate(messages: Any, max_tokens: int = MAX_TOKENS, *, on_stream: Any = None, **options: Any) -> ModelOutput:
    given = {name: options.pop(name) for name in ("tools", "tool_choice") if name in options}
    config = GenerateConfig(temperature=0, max_tokens=max_tokens, max_retries=0, **options)

    async def one() -> ModelOutput:
        model = get_model(f"openai-api/loraplex/{MODEL}", base_url=f"{URL}/v1", api_key=KEY, memoize=False)
        return await model.generate(messages, config=config, on_stream=on_stream, **given)

    return asyncio.run(one())


def chat() -> Any:
    return generate(TASK["question"]).completion


def stream() -> Any:
    deltas = []

    async def keep(event: Any) -> None:
        if event.type == "text":
            deltas.append(event.text)

    generate(TASK["question"], on_stream=keep)
    return {"deltas": deltas}


def tools() -> Any:
    tool = ToolInfo(
        name=WEATHER["name"],
        description=WEATHER["description"],
        parameters=ToolParams(**{k: v for k, v in WEATHER["parameters"].items() if k != "type"}),
    )
    question = ChatMessageUser(content=WEATHER["question"])
    chosen = ToolFunction(WEATHER["name"])
    message = generate([question], JSON_TOKENS, tools=[tool], tool_choice=chosen).message

    async def ignore(_: Any) -> None:
        pass

    streamed = generate([question], JSON_TOKENS, tools=[tool], tool_choice=chosen, on_stream=ignore).message
    results = [
        ChatMessageTool(content=WEATHER["result"], tool_call_id=made.id, function=made.function)
        for made in message.tool_calls
    ]
    answer = generate([question, message, *results], tools=[tool], tool_choice="none")
    return {"calls": _calls(message), "streamed": _calls(streamed), "answer": answer.completion}


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call(made.function, made.arguments) for made in message.tool_calls]


def json_schema() -> Any:
    schema = ResponseSchema(name=PERSON["name"], json_schema=schema_of(Person), strict=True)
    output = generate(PERSON["question"], JSON_TOKENS, response_schema=schema)
    return Person.model_validate_json(output.completion).model_dump()


def logprobs() -> Any:
    output = generate(TASK["question"], logprobs=True, top_logprobs=2)
    return [token.logprob for token in output.choices[0].logprobs.content]


report(
    {"embeddings": "Inspect evaluates generations alone"},
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    logprobs=logprobs,
)

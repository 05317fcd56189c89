"""Pydantic AI's agents and embedder."""

import asyncio
from typing import Any

from driver import (
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    PERSON,
    TASK,
    TEXTS,
    URL,
    WEATHER,
    Person,
    Weather,
    call,
    report,
)
from pydantic_ai import Agent, Embedder, NativeOutput, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider


def provider() -> OpenAIProvider:
    return OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)


def agent(max_tokens: int = MAX_TOKENS, output_type: Any = str, **settings: Any) -> Agent[None, Any]:
    model = OpenAIChatModel(MODEL, provider=provider())
    chosen = OpenAIChatModelSettings(temperature=0, max_tokens=max_tokens, **settings)
    return Agent(model, output_type=output_type, model_settings=chosen, retries=0)


def chat() -> Any:
    return agent().run_sync(TASK["question"]).output


def stream() -> Any:
    async def deltas() -> list[str]:
        async with agent().run_stream(TASK["question"]) as result:
            return [delta async for delta in result.stream_text(delta=True, debounce_by=None)]

    return {"deltas": asyncio.run(deltas())}


def tools() -> Any:
    output = ToolOutput(Weather, name=WEATHER["name"], description=WEATHER["description"])
    calling = agent(JSON_TOKENS, output)
    made = calling.run_sync(WEATHER["question"])

    async def streamed() -> Weather:
        async with calling.run_stream(WEATHER["question"]) as result:
            return await result.get_output()

    answer = agent().run_sync(f"The result: {WEATHER['result']}", message_history=made.all_messages())
    return {
        "calls": [call(WEATHER["name"], made.output.model_dump())],
        "streamed": [call(WEATHER["name"], asyncio.run(streamed()).model_dump())],
        "answer": answer.output,
    }


def json_schema() -> Any:
    return agent(JSON_TOKENS, NativeOutput(Person)).run_sync(PERSON["question"]).output.model_dump()


def embeddings() -> Any:
    embedder = Embedder(OpenAIEmbeddingModel(MODEL, provider=provider()))
    return [list(vector) for vector in embedder.embed_documents_sync(TEXTS).embeddings]


def logprobs() -> Any:
    result = agent(openai_logprobs=True, openai_top_logprobs=2).run_sync(TASK["question"])
    return [token["logprob"] for token in result.response.provider_details["logprobs"]]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)

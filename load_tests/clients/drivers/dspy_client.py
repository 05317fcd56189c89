"""DSPy: its language model, and programs with the adapter for JSON."""

import asyncio
import json
from typing import Any

import dspy
from driver import (
    FUNCTION,
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    NAMED,
    PERSON,
    QUESTION,
    TASK,
    TEXTS,
    URL,
    WEATHER,
    Person,
    call,
    report,
)
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition

SERVER: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY}
# What a model supports must be said, or DSPy sends unknown models no `response_format`.
dspy.lm15.register_provider(
    ProviderDefinition.chat(
        AccessPolicy(provider="loraplex", base_url=f"{URL}/v1"), compat=OpenAIChatCompat.preset("vllm")
    ),
    supports=ModelSupport(function_calling=True, response_schema=True),
)


def lm(max_tokens: int = MAX_TOKENS, **options: Any) -> dspy.LM:
    common = {"temperature": 0, "max_tokens": max_tokens, "cache": False, "num_retries": 0}
    return dspy.LM(f"loraplex/{MODEL}", **common, **options, **SERVER)


def chat() -> Any:
    return lm()(messages=QUESTION)[0]


def stream() -> Any:
    """A field of a program, whose prompt is DSPy's own. With this adapter DSPy streams the field as JSON."""
    dspy.configure(lm=lm(JSON_TOKENS), adapter=dspy.JSONAdapter())
    predict = dspy.Predict("question -> answer")
    program = dspy.streamify(predict, stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")])

    async def deltas() -> list[str]:
        parts = [part async for part in program(question=TASK["question"])]
        return [part.chunk for part in parts if isinstance(part, dspy.streaming.StreamResponse)]

    whole = predict(question=TASK["question"]).answer
    return {"deltas": asyncio.run(deltas()), "whole": f" {json.dumps(whole)}"}


def tools() -> Any:
    (output,) = lm(JSON_TOKENS)(
        messages=[{"role": "user", "content": WEATHER["question"]}],
        tools=[{"type": "function", "function": FUNCTION}],
        tool_choice=NAMED,
    )
    return {"calls": [call(made.function.name, made.function.arguments) for made in output["tool_calls"]]}


class Extract(dspy.Signature):
    """Find the person in the text."""

    text: str = dspy.InputField()
    person: Person = dspy.OutputField()


def json_schema() -> Any:
    with dspy.context(lm=lm(JSON_TOKENS), adapter=dspy.JSONAdapter()):
        return dspy.Predict(Extract)(text=PERSON["question"]).person.model_dump()


def embeddings() -> Any:
    embedder = dspy.Embedder(f"hosted_vllm/{MODEL}", caching=False, **SERVER)
    return [[float(value) for value in vector] for vector in embedder(TEXTS)]


def logprobs() -> Any:
    (output,) = lm(logprobs=True, top_logprobs=2)(messages=QUESTION)
    return [token.logprob for token in output["logprobs"].content]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)

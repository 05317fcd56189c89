"""What follows from a request is one plan, and an endpoint is a schema and a formatter."""

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse

from server.api.context import AppContext
from server.api.errors import ApiError
from server.api.inference.choices import Delta
from server.api.inference.generation import Generation
from server.api.inference.plan import AdmittedRequest, GenerationPlan, plan_generation
from server.api.inference.responses import respond
from server.api.inference.streaming import EventStream
from server.api.inference.targets import resolve_target
from server.api.middleware.auth import ANYONE
from server.api.requests.chat import ChatCompletionRequest
from server.api.requests.completions import CompletionRequest
from server.api.requests.inference import GenerationRequest
from server.api.schemas import Wire
from server.request import SamplingParams
from tests.fixtures.api_server import BASE, MAX_MODEL_LEN, Api, base_plan, serving


def planned(context: AppContext, body: GenerationRequest, *prompts: list[int]) -> GenerationPlan:
    target = resolve_target(context, ANYONE, body)
    return plan_generation(context, AdmittedRequest(target, context.tokenizer, ANYONE, 7.0), body, prompts)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": BASE, "prompt": "x", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "x"}]
    return ChatCompletionRequest.model_validate({"model": BASE, "messages": messages, **fields})


async def test_a_plan_holds_what_was_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        options = {"include_usage": True}
        body = completion(n=2, stop="x", seed=5, logprobs=3, stream=True, stream_options=options)
        plan = planned(api.context, body, [1, 2], [3])
        assert plan == GenerationPlan(
            target=resolve_target(api.context, ANYONE, body),
            tokenizer=api.context.tokenizer,
            key=ANYONE,
            received=7.0,
            id_prefix="cmpl",
            prompts=([1, 2], [3]),
            sampling=SamplingParams(max_tokens=16, seed=5, logprobs=3),
            stop=("x",),
            n=2,
            stream=True,
            include_usage=True,
        )
        assert plan.prompt_tokens == 3


async def test_a_plan_does_not_change(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        plan = planned(api.context, completion(), [1])
        for field in dataclasses.fields(plan):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(plan, field.name, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, MAX_MODEL_LEN - 1),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 2, "max_tokens": 3}, 2),
    ],
)
async def test_a_chat_may_take_the_rest_of_the_context(
    tmp_path: Path, fields: Mapping[str, int], expected: int
) -> None:
    async with serving(tmp_path) as api:
        assert planned(api.context, chat(**fields), [1]).sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chat(), None),
        (chat(logprobs=False), None),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=4), 4),
        (completion(), None),
        (completion(logprobs=0), 0),
    ],
)
async def test_log_probabilities_are_planned_by_endpoint(
    tmp_path: Path, body: GenerationRequest, expected: int | None
) -> None:
    async with serving(tmp_path) as api:
        assert planned(api.context, body, [1]).sampling.logprobs == expected


# -- another format ----------------------------------------------------------------------------------------------------


class Words(Wire):
    words: str


class WordsFormatter:
    """A format without choices, of which every event has a name."""

    def __init__(self, generation: Generation):
        self._left = generation.plan.sampling.max_tokens

    def body(self, deltas: list[Delta]) -> Words:
        return Words(words=" ".join(delta.text for delta in deltas))

    def opening(self) -> bytes:
        return b"event: begin\n\n"

    def has_event(self, delta: Delta) -> bool:
        return bool(delta.text)

    def event(self, delta: Delta) -> bytes:
        self._left -= len(delta.token_ids)
        return f"event: words\ndata: {delta.text} {self._left}\n\n".encode()

    def ending(self) -> bytes:
        return b"event: end\n\n"

    def failure(self, error: ApiError) -> bytes:
        return f"event: failed\ndata: {error.code}\n\n".encode()


async def silent() -> Any:
    await asyncio.Event().wait()


async def streamed(api: Api, plan: GenerationPlan) -> str:
    scope: dict[str, Any] = {"type": "http", "state": {}}
    response = await respond(api.context, Request(scope), plan, WordsFormatter)
    assert isinstance(response, EventStream)
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))

    await response(scope, silent, send)
    return b"".join(bodies).decode()


async def test_a_formatter_of_its_own_names_its_events(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("ab")
        text = await streamed(api, base_plan(api.context, SamplingParams(max_tokens=2)))
        assert text.startswith("event: begin\n\nevent: words\ndata: ") and text.endswith(" 0\n\nevent: end\n\n")
        assert not len(api.context.in_flight)


async def test_a_stream_that_fails_ends_in_the_words_of_its_formatter(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("x", end=False)
        api.engine.fail_after, api.engine.failure = 2, "it broke"
        text = await streamed(api, base_plan(api.context, SamplingParams(max_tokens=9)))
        assert "event: end" not in text and text.endswith("event: failed\ndata: engine_error\n\n")
        assert not len(api.context.in_flight)


async def test_a_body_of_another_format(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("ab")
        plan = dataclasses.replace(base_plan(api.context, SamplingParams(max_tokens=9), n=2), stream=False)
        request = Request({"type": "http", "state": {}}, receive=silent)
        response = await respond(api.context, request, plan, WordsFormatter)
        assert isinstance(response, JSONResponse)
        assert json.loads(bytes(response.body)) == {"words": "ab ab"}

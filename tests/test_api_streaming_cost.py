"""The cost of a streamed token, in counts: wake-ups, events, encoder calls, timers and tasks. No times."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from server.api.inference import formatting
from server.api.inference.completions import CompletionFormatter
from server.api.inference.generation import start_generation
from server.api.inference.streaming import EventStream
from server.ipc.messages import StepOutputs
from server.ipc.stream import Stream
from server.request import SamplingParams
from tests.fixtures.api_server import Api, base_plan, serving


class Sent:
    """The server's side of a connection: keeps the bodies it is given, and is as slow as `wait` makes it."""

    def __init__(self, wait: Callable[[], bool] = lambda: False):
        self.bodies: list[bytes] = []
        self._wait = wait

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            while self._wait():
                await asyncio.sleep(0)

    def events(self) -> list[dict[str, Any]]:
        frames = b"".join(self.bodies).decode().split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def silent() -> Any:
    await asyncio.Event().wait()


async def stream(api: Api, sent: Sent, tokens: int, n: int = 1) -> None:
    """`tokens` of each of `n` choices; the engine says one of each per message."""
    api.says("x", end=False)
    generation = start_generation(api.context, base_plan(api.context, SamplingParams(max_tokens=tokens), n))
    answer = EventStream(generation, CompletionFormatter(generation))
    await answer({"type": "http", "state": {}}, silent, sent)


def texts(sent: Sent, n: int) -> list[str]:
    choices = [event["choices"][0] for event in sent.events()]
    return ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(n)]


@pytest.mark.parametrize("n", [1, 4])
async def test_a_message_of_the_engine_is_one_wake_up_and_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    taken: list[int] = []
    take = Stream.take

    async def counted(self: Stream) -> Any:
        outputs = await take(self)
        taken.append(len(outputs))
        return outputs

    monkeypatch.setattr(Stream, "take", counted)
    async with serving(tmp_path) as api:
        messages: list[StepOutputs] = []
        api.context.engine.add_listener(messages.append)
        sent = Sent()
        await stream(api, sent, tokens=10, n=n)
        with_outputs = [message for message in messages if message.outputs]
        assert len(with_outputs) == 10
        assert sum(taken) == 10 * n and len(taken) >= 9  # while the head was sent, a second message may have come
        assert len(sent.bodies) == len(taken) + 1  # and the end
        assert texts(sent, n) == ["x" * 10] * n


async def test_a_reader_that_lags_gets_what_it_missed_in_one_event(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        sent = Sent(wait=lambda: bool(api.engine._running))  # reads nothing until the engine has said everything
        await stream(api, sent, tokens=50)
        assert [len(event["choices"][0]["text"]) for event in sent.events()] == [1, 49]
        assert len(sent.bodies) == 2 + 1


async def test_an_event_is_one_call_of_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    encode = formatting._encode

    def counted(value: Any) -> bytes:
        encoded.append(value)
        return encode(value)

    monkeypatch.setattr(formatting, "_encode", counted)
    async with serving(tmp_path) as api:
        sent = Sent()
        await stream(api, sent, tokens=20)
        assert len(encoded) == len(sent.events()) + 1  # what all events begin with is encoded once


@pytest.mark.parametrize("n", [1, 4])
async def test_tokens_need_no_timers_and_no_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    loop = asyncio.get_running_loop()
    made = 0

    def counting(make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            return make(*args, **kwargs)

        return counted

    monkeypatch.setattr(loop, "call_at", counting(loop.call_at))
    monkeypatch.setattr(loop, "create_task", counting(loop.create_task))
    async with serving(tmp_path) as api:
        counts = []
        for tokens in (5, 100):
            made = 0
            await stream(api, Sent(), tokens, n)
            counts.append(made)
        assert 0 < counts[1] < counts[0] + 10  # the client's watch over the engine has a timer, too

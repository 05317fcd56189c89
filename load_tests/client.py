"""One streaming request to an OpenAI-compatible server, and what was seen of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import msgspec
from aiohttp import ClientError, ClientSession, TCPConnector
from httpx_aiohttp import AiohttpTransport

from load_tests.schedule import Planned

MAX_ERROR_CHARS = 300
FAILURES = (httpx.HTTPError, ClientError)  # of a client's requests


class Record(msgspec.Struct, kw_only=True):
    """What became of one request. Times are seconds since the start of the run; None where it did not get that far."""

    model: str
    model_class: str
    scheduled_s: float
    sent_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: list[float] = []  # between one event with text and the next
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: int = 0  # of HTTP; 0 when there was no answer
    error: str | None = None  # a code, or the failure's name
    detail: str | None = None

    def token_seen(self, now_s: float) -> None:
        if self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s


def new_client(url: str, api_key: str | None = None, timeout_s: float = 60) -> httpx.AsyncClient:
    """As many connections as there are requests. httpx's own transport parses HTTP in Python, which took more of the
    cores that it shares with a server under test than that server's own HTTP did."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Given up before uvicorn closes what has been idle for five seconds.
    wire = AiohttpTransport(client=lambda: ClientSession(connector=TCPConnector(limit=0, keepalive_timeout=3)))
    return httpx.AsyncClient(base_url=url, headers=headers, transport=wire, timeout=timeout_s)


class Failed(Exception):
    def __init__(self, code: str, detail: str):
        super().__init__(code)
        self.code, self.detail = code, detail[:MAX_ERROR_CHARS]


class Clock:
    """Seconds since it was started."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def complete(
    client: httpx.AsyncClient,
    endpoint: Literal["completions", "chat"],
    planned: Planned,
    clock: Clock,
    *,
    scheduled_s: float,
    timeout_s: float,
) -> Record:
    """Send it and read its stream to the end. Whatever goes wrong is in the record."""
    record = Record(model=planned.model, model_class=planned.model_class, scheduled_s=scheduled_s, sent_s=clock())
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(client, endpoint, planned, clock, record)
    except TimeoutError:
        record.error, record.detail = "timeout", f"no end within {timeout_s} s"
    except FAILURES as error:
        cause = error.__cause__ or error  # the transport's own name for it: httpx has fewer
        record.error, record.detail = type(cause).__name__, str(error)[:MAX_ERROR_CHARS]
    except Failed as failed:
        record.error, record.detail = failed.code, failed.detail
    return record


async def _stream(
    client: httpx.AsyncClient, endpoint: Literal["completions", "chat"], planned: Planned, clock: Clock, record: Record
) -> None:
    path = "/v1/completions" if endpoint == "completions" else "/v1/chat/completions"
    async with client.stream("POST", path, json=body_of(endpoint, planned)) as answer:
        record.status = answer.status_code
        if answer.status_code != httpx.codes.OK:
            raise _refusal(await answer.aread(), answer.status_code)
        async for event in _events(answer):
            if event.error is not None:
                raise Failed(str(event.error.code or event.error.type or "error"), event.error.message)
            if any(_shows_token(choice, record) for choice in event.choices):
                record.token_seen(clock())
            if event.usage is not None:
                record.prompt_tokens, record.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    if not record.output_tokens:
        raise Failed("no_tokens", "the stream ended without a token or without usage")


def body_of(endpoint: Literal["completions", "chat"], planned: Planned) -> dict[str, Any]:
    """`ignore_eos` (vLLM's extra) makes the number of tokens that which was drawn."""
    prompt: dict[str, Any] = (
        {"prompt": planned.prompt}
        if endpoint == "completions"
        else {"messages": [{"role": "user", "content": planned.prompt}]}
    )
    return {
        "model": planned.model,
        **prompt,
        "max_tokens": planned.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **planned.fields,
    }


def _refusal(content: bytes, status: int) -> Failed:
    try:
        error = _decode(content).error or _Error()
    except msgspec.DecodeError:
        error = _Error(message=content.decode(errors="replace"))
    return Failed(str(error.code or error.type or f"http_{status}"), error.message)


async def _events(answer: httpx.Response) -> AsyncIterator[_Event]:
    """The stream's events. Raises `Failed` for one that is no JSON, or when [DONE] does not come."""
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            try:
                yield _decode(line[6:])
            except msgspec.DecodeError as error:
                raise Failed("malformed_event", str(error)) from error
    raise Failed("cut_off", "the stream ended without [DONE]")


def _shows_token(choice: _Choice, record: Record) -> bool:
    """Text, or the end of an answer whose tokens made none."""
    text = choice.text or (choice.delta.content if choice.delta else None)
    return bool(text) or (choice.finish_reason is not None and record.first_token_s is None)

"""The load client records a stream that succeeds, and every way in which a stream fails."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, Literal

import httpx
import pytest

from load_tests.client import Clock, Record, complete, new_client
from load_tests.schedule import Planned
from tests.fixtures.timing import HANG_SECONDS

PLANNED = Planned(0.0, "sql", "head", "hello", 3)
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def texts(*pieces: str) -> list[dict[str, Any]]:
    return [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]


def stream(*events: dict[str, Any], done: bool = True) -> httpx.Response:
    frames = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text="".join(frames))


async def record_of(
    handler: Callable[[httpx.Request], httpx.Response],
    endpoint: Literal["completions", "chat"] = "completions",
) -> Record:
    async with httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(handler)) as client:
        return await complete(client, endpoint, PLANNED, Clock(), scheduled_s=-1.0, timeout_s=HANG_SECONDS)


async def test_a_completion() -> None:
    sent: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, json.loads(request.content)))
        return stream(*texts("a", "b", "c"), USAGE)

    record = await record_of(handler)
    (path, body), *others = sent
    assert path == "/v1/completions" and not others
    assert (body["model"], body["prompt"], body["max_tokens"], body["stream"]) == ("sql", "hello", 3, True)
    assert body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    assert (record.status, record.error, record.prompt_tokens, record.output_tokens) == (200, None, 7, 3)
    assert len(record.gaps_s) == 2
    assert record.first_token_s is not None and record.last_token_s is not None
    assert record.scheduled_s < record.sent_s <= record.first_token_s <= record.last_token_s
    assert record.last_token_s - record.first_token_s == pytest.approx(sum(record.gaps_s))


async def test_a_chat_s_opening_is_no_token() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/chat/completions"
        assert json.loads(request.content)["messages"] == [{"role": "user", "content": "hello"}]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
        return stream(*({"choices": [{"delta": delta}]} for delta in deltas), USAGE)

    record = await record_of(handler, "chat")
    assert record.error is None and len(record.gaps_s) == 1


async def test_an_answer_without_text_has_its_first_token_at_its_end() -> None:
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    record = await record_of(lambda _: stream(*texts(""), end, USAGE))
    assert record.error is None and record.first_token_s is not None and record.gaps_s == []


def _unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    ("handler", "status", "error"),
    [
        (lambda _: httpx.Response(503, json={"error": {"message": "full", "code": "queue_full"}}), 503, "queue_full"),
        (lambda _: httpx.Response(502, text="<html>"), 502, "http_502"),
        (lambda _: stream(*texts("a"), {"error": {"message": "gone", "code": "engine_died"}}), 200, "engine_died"),
        (lambda _: stream(*texts("a"), USAGE, done=False), 200, "cut_off"),
        (lambda _: stream(*texts("a")), 200, "no_tokens"),
        (lambda _: httpx.Response(200, text="data: {\n\n"), 200, "malformed_event"),
        (_unreachable, 0, "ConnectError"),
    ],
)
async def test_a_failure_is_recorded(
    handler: Callable[[httpx.Request], httpx.Response], status: int, error: str
) -> None:
    record = await record_of(handler)
    assert (record.status, record.error) == (status, error)
    assert record.detail


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
END = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (HEAD + 3 * _chunk(TOKEN) + _chunk(END) + b"0\r\n\r\n", 200, None),
        (HEAD + _chunk(TOKEN), 200, "ClientPayloadError"),
        (b"", 0, "ServerDisconnectedError"),
        (b"SSH-2.0\r\n\r\n", 0, "HttpProcessingError"),
    ],
)
async def test_over_a_real_connection(answer: bytes, status: int, error: str | None) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        record = await record_over_wire(server.sockets[0].getsockname()[1])
    assert (record.status, record.error) == (status, error)
    assert len(record.gaps_s) == (2 if error is None else 0)


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        record = await record_over_wire(taken.getsockname()[1])
    assert (record.status, record.error) == (0, "ClientConnectorError") and record.detail


async def record_over_wire(port: int) -> Record:
    async with new_client(f"http://127.0.0.1:{port}") as client:
        return await complete(client, "completions", PLANNED, Clock(), scheduled_s=-1.0, timeout_s=HANG_SECONDS)

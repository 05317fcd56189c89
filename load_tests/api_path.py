"""What a streamed token costs outside the model: the API process over an engine that answers at once.

    python -m load_tests.api_path [--streams 256] [--tokens 256] [--rates 5000,30000] [--rounds 3] [--out FILE]

The server is the one that `loraplex serve` runs (uvicorn, ZeroMQ, SmolLM2's tokenizer), on a core of its own; the
engine process (`null_engine`) and the client are on another one. `rates` are the tokens per second that the engine
offers to all streams together: at a low one each token is an event of its own, at a high one the server falls behind
and puts several into one. A bare Starlette stream of equal events, under the same uvicorn and with the same client, is
measured in turn with it. CPU time per 1,000 tokens is the stable figure on a machine that others use.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from load_tests import null_engine
from server.api.middleware.auth import KeyRing
from server.config import ServeConfig
from server.model.loading.default_model import DEFAULT_MODEL, prepare_default_model

PATH = "/v1/chat/completions"
SERVER_CORE, CLIENT_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
_USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True)
class Round:
    tokens: int
    events: int
    seconds: float  # from the first token of any stream to the last of all
    cpu_seconds: float  # of the server process, requests and all

    def figures(self) -> dict[str, float]:
        return {
            "tokens_per_second": round(self.tokens / self.seconds),
            "events_per_second": round(self.events / self.seconds),
            "tokens_per_event": round(self.tokens / self.events, 2),
            "cpu_seconds_per_1000_tokens": round(1000 * self.cpu_seconds / self.tokens, 4),
            "cpu_seconds_per_1000_events": round(1000 * self.cpu_seconds / self.events, 4),
        }


# -- the servers, each in a process of its own -------------------------------------------------------------------------


def serve_api(ready: Connection, step_seconds: float) -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    os.environ |= {null_engine.STEP_SECONDS: str(step_seconds), null_engine.CORE: str(CLIENT_CORE)}
    asyncio.run(_serve_api(ready))


async def _serve_api(ready: Connection) -> None:
    from adapters.registry.registry import AdapterRegistry
    from server.api.context import AppContext
    from server.api.text.tokenizer import Tokenizer
    from server.ipc.client import EngineClient
    from server.ipc.process_transport import ProcessTransport
    from server.metrics import Metrics
    from server.model.loading.tokenizer import load_tokenizer
    from server.serve import Server

    model = str(prepare_default_model())
    with tempfile.TemporaryDirectory() as folder:
        config = ServeConfig(model=model, port=0, data_dir=Path(folder), max_queue=4096)
        engine = EngineClient(ProcessTransport(config, "load_tests.null_engine"))
        registry = AdapterRegistry(Path(folder))
        context = AppContext(
            config,
            engine,
            registry,
            KeyRing(),
            Metrics(DEFAULT_MODEL),
            base_model=DEFAULT_MODEL,
            base_tokenizer=Tokenizer.of(load_tokenizer(model)),
        )
        await engine.start()
        await _until_stopped(Server(context), ready)
        await context.sandbox.close()
        await engine.stop()
        registry.close()


async def _until_stopped(server: uvicorn.Server, ready: Connection) -> None:
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    ready.send(server.servers[0].sockets[0].getsockname()[1])
    await asyncio.to_thread(ready.recv)
    server.should_exit = True
    await serving


def serve_bare(ready: Connection, step_seconds: float) -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    app = Starlette(routes=[Route(PATH, _BareStreams(step_seconds).answer, methods=["POST"])])
    config = uvicorn.Config(app, port=0, http="h11", lifespan="off", log_config=None, access_log=False)
    asyncio.run(_until_stopped(uvicorn.Server(config), ready))


class _BareStreams:
    """One event per stream and tick, each an equal frame that was made beforehand; a late one is not left out."""

    def __init__(self, step_seconds: float):
        self._step_seconds = step_seconds
        self._ticks = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def answer(self, request: Request) -> StreamingResponse:
        wanted = (await request.json())["max_tokens"]
        return StreamingResponse(self._events(wanted), media_type="text/event-stream")

    async def _events(self, wanted: int) -> AsyncIterator[bytes]:
        choice = {"index": 0, "delta": {"content": " quick"}, "logprobs": None, "finish_reason": None}
        head = {"id": f"chatcmpl-{'0' * 32}", "object": "chat.completion.chunk", "created": 0, "model": DEFAULT_MODEL}
        frame = f"data: {json.dumps(head | {'choices': [choice], 'usage': None})}\n\n".encode()
        started = self._ticks
        for sent in range(wanted):
            while sent >= self._ticks - started:
                await self._tick()
            yield frame
        yield b'data: {"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % wanted

    def _tick(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(self._step_seconds, self._wake)
        self._waiting.append(loop.create_future())
        return self._waiting[-1]

    def _wake(self) -> None:
        self._ticks += 1
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


# -- the client --------------------------------------------------------------------------------------------------------


class _Stream(asyncio.Protocol):
    """Sends one request and keeps what comes, as it came: parsing it must not slow down who is measured."""

    def __init__(self, request: bytes):
        self._request = request
        self.chunks: list[bytes] = []
        self.first = self.last = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.chunks.append(data)
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)

    def counted(self) -> tuple[int, int]:
        """Tokens and events. The last two events are usage and end."""
        answer = b"".join(self.chunks)
        usage = _USAGE.search(answer)
        if usage is None or b"data: [DONE]" not in answer:
            raise RuntimeError(f"a stream did not end well: {answer[:300]!r} ... {answer[-300:]!r}")
        return int(usage[1]), answer.count(b"data: ") - 2


async def _load(port: int, streams: int, tokens: int) -> tuple[int, int, float]:
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Tell me about the fox."}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(lambda: _Stream(head.encode() + data), "127.0.0.1", port))[1]
        for _ in range(streams)
    ]
    await asyncio.gather(*(stream.done for stream in opened))
    counts = [stream.counted() for stream in opened]
    seconds = max(stream.last for stream in opened) - min(stream.first for stream in opened)
    return sum(count[0] for count in counts), sum(count[1] for count in counts), seconds


def load(result: Connection, port: int, streams: int, tokens: int) -> None:
    os.sched_setaffinity(0, {CLIENT_CORE})
    result.send(asyncio.run(_load(port, streams, tokens)))


# -- the measurement ---------------------------------------------------------------------------------------------------

_processes = multiprocessing.get_context("spawn")


class Server:
    """A server in a process of its own, pinned to one core."""

    def __init__(self, serve: Callable[[Connection, float], None], step_seconds: float):
        self._pipe, theirs = _processes.Pipe()
        self._process = _processes.Process(target=serve, args=(theirs, step_seconds))
        self._process.start()
        theirs.close()  # so that its death is an error here and no endless wait
        self.port: int = self._pipe.recv()
        self.pid = self._process.pid

    def measure(self, streams: int, tokens: int) -> Round:
        process = psutil.Process(self.pid)
        before = sum(process.cpu_times()[:2])
        ours, theirs = _processes.Pipe()
        client = _processes.Process(target=load, args=(theirs, self.port, streams, tokens))
        client.start()
        theirs.close()
        tokens, events, seconds = ours.recv()
        client.join()
        return Round(tokens, events, seconds, sum(process.cpu_times()[:2]) - before)

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()


def compare(streams: int, tokens: int, rate: float, rounds: int) -> dict[str, Any]:
    """Rounds of the server and of the bare stream in turn; medians, and each round's figures."""
    servers = {"loraplex": Server(serve_api, streams / rate), "bare": Server(serve_bare, streams / rate)}
    try:
        for server in servers.values():
            server.measure(streams, 8)  # warm
        measured = {name: [] for name in servers}  # type: dict[str, list[Round]]
        for _ in range(rounds):
            for name, server in servers.items():
                measured[name].append(server.measure(streams, tokens))
    finally:
        for server in servers.values():
            server.stop()
    return {"offered_tokens_per_second": rate} | {name: _summary(found) for name, found in measured.items()}


def _summary(rounds: list[Round]) -> dict[str, Any]:
    figures = [measured.figures() for measured in rounds]
    medians = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    return {"median": medians, "rounds": [asdict(measured) for measured in rounds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="per stream")
    parser.add_argument("--rates", default="5000,30000", help="tokens per second that the engine offers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write JSON here, too")
    args = parser.parse_args()
    rates = [float(rate) for rate in args.rates.split(",")]
    found = [compare(args.streams, args.tokens, rate, args.rounds) for rate in rates]
    report = json.dumps({"streams": args.streams, "tokens_per_stream": args.tokens, "rates": found}, indent=2)
    print(report)
    if args.out:
        args.out.write_text(report)


if __name__ == "__main__":
    main()

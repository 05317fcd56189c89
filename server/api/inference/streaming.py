"""Server-sent events: frames with a precomputed prefix, and a response that always terminates."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError, error_body
from server.api.inference.generation import Delta, Generation
from server.api.middleware.request_scope import unless_disconnected
from server.api.schemas import UsageBody

_WRITE_SECONDS = 30.0  # a client that reads nothing for this long is considered gone
_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode

ChoiceEncoder = Callable[[Delta], dict[str, Any]]


class Frames:
    """Frames of one response. Everything but the choices is encoded once."""

    def __init__(self, generation: Generation, kind: str, include_usage: bool):
        head = {
            "id": generation.id,
            "object": kind,
            "created": generation.created,
            "model": generation.target.requested_model,
            "system_fingerprint": generation.target.fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        return self._head + _encode(choice) + self._tail

    def usage(self, usage: UsageBody) -> bytes:
        return self._head + b'],"usage":' + _encode(usage.model_dump()) + b"}\n\n"

    @staticmethod
    def error(error: ApiError) -> bytes:
        body = error_body(error.status_code, str(error.detail), code=error.code, param=error.param)
        return b"data: " + _encode(body) + b"\n\n"


class EventStream(Response):
    """Streams a generation. Starts with the first token, so that an earlier failure becomes a normal error response."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        encode: ChoiceEncoder,
        *,
        kind: str,
        include_usage: bool,
        opening: ChoiceEncoder | None = None,
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._encode_choice = encode
        self._opening = opening
        self._frames = Frames(generation, kind, include_usage)
        self._include_usage = include_usage
        self._started = False
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._run(scope, send), self._stalled())
        finally:
            self._generation.close()

    async def _run(self, scope: Scope, send: Send) -> None:
        try:
            await self._write_deltas(send)
        except ApiError as error:
            if not self._started:
                raise
            scope["state"]["status"] = error.status_code  # for the metrics; the client has received 200
            ending = Frames.error(error)
        else:
            ending = self._frames.usage(self._generation.usage()) if self._include_usage else b""
        await self._write(send, ending + _DONE, more=False)

    async def _write_deltas(self, send: Send) -> None:
        async with aclosing(self._generation.deltas()) as batches:
            async for deltas in batches:
                if not self._started:
                    await self._start(send)
                frames = [
                    self._frames.choice(self._encode_choice(delta))
                    for delta in deltas
                    if delta.text or delta.scores or delta.finish_reason
                ]
                if frames:
                    await self._write(send, b"".join(frames))

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._opening is not None:
            opening = [self._opening(Delta(index)) for index in range(len(self._generation))]
            await self._write(send, b"".join(map(self._frames.choice, opening)))

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._writing_since = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing_since = None

    async def _stalled(self) -> None:
        """Return once a write has lasted `_WRITE_SECONDS`. One timer serves all writes, because few of them block."""
        left = _WRITE_SECONDS
        while left > 0:
            await asyncio.sleep(left)
            since = self._writing_since
            left = _WRITE_SECONDS if since is None else since + _WRITE_SECONDS - time.monotonic()

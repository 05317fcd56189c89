"""Server-sent events: a response that always terminates."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError
from server.api.inference.choices import Delta
from server.api.inference.formatting import Formatter
from server.api.inference.generation import Generation
from server.api.middleware.request_scope import unless_disconnected

HEAD_SECONDS = 0.2  # a request that fails sooner gets a normal error response
COMMENT_SECONDS = 10.0  # between comments before the first output, for proxies that close idle connections
_COMMENT = b": the request waits or its prompt is being computed\n\n"
_WRITE_SECONDS = 30.0  # a client that reads nothing for this long is considered gone


class EventStream(Response):
    """Streams a generation. Starts with the first output or shortly after the admission, so that an early failure
    becomes a normal error response."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, formatter: Formatter):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._formatter = formatter
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
            ending = self._formatter.failure(error)
        else:
            ending = self._formatter.ending()
        await self._write(send, ending, more=False)

    async def _write_deltas(self, send: Send) -> None:
        async with aclosing(self._generation.deltas()) as batches:
            await self._write_events(send, await self._first(batches, send))
            async for deltas in batches:
                await self._write_events(send, deltas)

    async def _first(self, batches: AsyncGenerator[list[Delta], None], send: Send) -> list[Delta]:
        """Return the first output. Meanwhile, send the head and then comments."""
        first = asyncio.ensure_future(anext(batches))
        try:
            while not (await asyncio.wait({first}, timeout=COMMENT_SECONDS if self._started else HEAD_SECONDS))[0]:
                await (self._write(send, _COMMENT) if self._started else self._send_head(send))
            deltas = first.result()
        finally:
            if not first.done():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        if not self._started:
            await self._send_head(send)
        return deltas

    async def _write_events(self, send: Send, deltas: list[Delta]) -> None:
        events = b"".join(self._formatter.event(delta) for delta in deltas if self._formatter.has_event(delta))
        if events:
            await self._write(send, events)

    async def _send_head(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        opening = self._formatter.opening()
        if opening:
            await self._write(send, opening)

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

"""One HTTP connection: uvicorn's h11 protocol with deadlines, a place among the connections, and JSON errors."""

import asyncio
import json
import uuid
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.errors import error_body
from server.http.connection import BoundedConnection
from server.http.limits import ConnectionLimits

HEAD_SECONDS = 10.0  # for a request's head, from the connection or the head's first byte
REST_SECONDS = 5.0  # for the rest of a body that is not read, after its response
WRITE_SECONDS = 30.0  # for a client that does not read to read again

_PIECE_BYTES = 64 << 10  # taken from the network per turn of the event loop
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large", 503: b"Unavailable"}
_REFUSALS = {
    400: ("The request is not valid HTTP/1.1.", "invalid_http"),
    408: (f"The request's headers did not arrive within {HEAD_SECONDS:g} seconds.", "timeout"),
    431: ("The request's headers are too many or too large.", "headers_too_large"),
    503: ("The server has too many connections, in all or from this address.", "too_many_connections"),
}


class BoundedProtocol(H11Protocol):
    """A connection that cannot be held for nothing. `HttpServer` calls `enforce` regularly."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        limits: ConnectionLimits,
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: BoundedConnection = BoundedConnection()
        self._limits = limits
        self._has_place = False
        self._unparsed = bytearray()
        self._turn: asyncio.Handle | None = None  # the parsing that is scheduled
        self._waits_for: tuple[str, object] | None = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._since = self.loop.time()
        self._waits_for = self._wait()
        self._has_place = self._limits.enter(self._host)
        if not self._has_place:
            self.logger.warning("a connection was refused: there are too many, in all or from its address")
            self._refuse(503)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._turn is not None:
            self._turn.cancel()
        if self._has_place:
            self._limits.leave(self._host)

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        if self._turn is None:
            self._take_turn()

    def _take_turn(self) -> None:
        """Parse some of what has arrived, and leave the rest to the next turn of the event loop, or to the end of the
        response if it belongs to a next request."""
        self._turn = None
        if self.transport.is_closing():
            return
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE):
            if self._unparsed:
                self.flow.pause_reading()
            return
        piece = bytes(self._unparsed[:_PIECE_BYTES])
        del self._unparsed[:_PIECE_BYTES]
        if piece:
            super().data_received(piece)
        else:
            self.handle_events()
        self._continue_later()

    def _continue_later(self) -> None:
        if (self._unparsed or self.conn.is_exhausted) and self._turn is None:
            self.flow.pause_reading()
            self._turn = self.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self.flow.resume_reading()  # parsing pauses it again where the application has not read enough
        self._take_turn()

    def handle_events(self) -> None:
        self.conn.start_turn()
        super().handle_events()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._continue_later()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self.conn.refusal)

    def _refuse(self, status: int) -> None:
        """End the connection, with an error body if no response has begun."""
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(_body(status)).encode()
            self.transport.write(self.conn.send(_head(status, len(body))) + body)
        if self.cycle is not None:  # its application must not respond as well
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def enforce(self, now: float) -> None:
        """End the connection if it has waited too long for its client."""
        waits_for = self._wait()
        if waits_for != self._waits_for:
            self._waits_for, self._since = waits_for, now
        elif waits_for is not None and now - self._since >= _PATIENCE[waits_for[0]]:
            self._end(waits_for[0])

    def _wait(self) -> tuple[str, object] | None:
        """Return what the connection waits for from its client, with the request that this concerns, or None."""
        if self.transport.is_closing() or self.flow.write_paused:
            return "reading", self.transport.is_closing()
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            return "head", self.cycle
        if self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            return "rest", self.cycle
        return None

    def _end(self, waited_for: str) -> None:
        self.logger.warning("a connection was closed: its client kept the server waiting (%s)", waited_for)
        if waited_for == "reading":
            self.transport.abort()
        elif waited_for == "head" and self.conn.trailing_data[0]:
            self._refuse(408)
        else:
            self.transport.close()


_PATIENCE = {"head": HEAD_SECONDS, "rest": REST_SECONDS, "reading": WRITE_SECONDS}


def _body(status: int) -> dict[str, Any]:
    message, code = _REFUSALS[status]
    return error_body(status, message, code=code)


def _head(status: int, length: int) -> h11.Response:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % length),
        (b"x-request-id", uuid.uuid4().hex.encode()),
        (b"connection", b"close"),
        *([(b"retry-after", b"2")] if status == 503 else []),
    ]
    return h11.Response(status_code=status, headers=headers, reason=_REASONS[status])

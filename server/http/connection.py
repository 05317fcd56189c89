"""The HTTP/1.1 parser: h11 with bounds on a request's head and on the work done at a time."""

import re
from typing import Any

import h11

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
EVENTS_PER_TURN = 64  # about a millisecond of parsing; h11 makes one event of every chunk of a chunked body

_BLANK_LINE = re.compile(rb"\n\r?\n")


class BoundedConnection(h11.Connection):
    """The server's side of one connection.

    h11 alone bounds only a head that is incomplete, and parses whatever has arrived in one call: a head of 50,000
    headers or a body of as many chunks would block the event loop for a fifth of a second. `refusal` is the status for
    the request that `next_event` refused.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal = 400
        self._events_left = EVENTS_PER_TURN

    @property
    def is_exhausted(self) -> bool:
        """Return whether `next_event` holds events back until `start_turn`."""
        return self._events_left == 0

    def start_turn(self) -> None:
        self._events_left = EVENTS_PER_TURN

    def next_event(self) -> Any:
        if self.is_exhausted:
            return h11.NEED_DATA
        self._events_left -= 1
        try:
            if self.their_state is h11.IDLE:
                _check_head(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_request(event)
        except h11.RemoteProtocolError as error:
            self.refusal = 431 if error.error_status_hint == 431 else 400
            raise
        return event


def _check_head(received: bytes) -> None:
    """Refuse a head by its size before it is parsed."""
    end = _BLANK_LINE.search(received, 0, MAX_HEAD_BYTES)
    too_long = end is None and len(received) > MAX_HEAD_BYTES
    if too_long or received.count(b"\n", 0, end.end() if end else None) > MAX_HEADERS + 2:
        raise h11.RemoteProtocolError("the request's head is too large", error_status_hint=431)


def _check_request(request: h11.Request) -> None:
    """Refuse other versions of HTTP, and a body of two lengths: a proxy may believe the one and this server the other
    (request smuggling)."""
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("another version of HTTP")
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length, or in HTTP/1.0")

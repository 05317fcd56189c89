"""Limits on the types, sizes, contents and arrival of bodies, checked by the headers first and while a body is read."""

import asyncio
import zlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, error_response

MAX_JSON_BYTES = 4 << 20
IDLE_SECONDS = 30.0  # maximum time between two chunks of a body
BODY_SECONDS = 60.0  # maximum time for a body, besides what SLOWEST allows for its size
SLOWEST = 64 << 10  # bytes per second of a large upload
_MULTIPART_OVERHEAD = 64 << 10  # boundaries and form fields around the files
_UPLOAD_PATH = "/v1/adapters"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's names for the formats

# Parsing holds the interpreter's lock, in a thread as well, so what it may take is bounded beforehand: about 50 ms. A
# text has brackets and commas as well, but never nearly as many.
_MAX_CONTAINERS = 1 << 16
_MAX_VALUES = 1 << 18
_VALUES_PER_TOKEN = 16  # of the context: a batch of prompts as token ids
_LEAST_VALUES = 1 << 16


class BodyLimitsMiddleware:
    """Rejects requests by their headers before the body is read, and bodies that exceed the declared length.

    A JSON body is collected here and handed on in one piece, so that the number of chunks it came in costs nothing, and
    refused if it has more values than a request for this model can need. `context_length` returns the model's.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int, context_length: Callable[[], int]):
        self._app = app
        self._max_upload_bytes = max_upload_bytes + _MULTIPART_OVERHEAD
        self._context_length = context_length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            limit = self._limit(scope["path"], headers)
            bounded = _bounded(receive, limit, BODY_SECONDS + (_content_length(headers) or 0) / SLOWEST)
            encoding = _encoding(headers, limit)
            if encoding is not None:
                bounded = _decompressed(bounded, encoding, limit)
            if limit and _content_type(headers) == "application/json":
                body = await _collect(bounded)
                self._check_values(body)
                bounded = _replay(body, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, bounded, send)

    def _check_values(self, body: bytes) -> None:
        most = min(_MAX_VALUES, _LEAST_VALUES + _VALUES_PER_TOKEN * self._context_length())
        containers = body.count(b"[") + body.count(b"{")
        if containers > _MAX_CONTAINERS or containers + body.count(b",") > most:
            raise ApiError(413, f"The body has more values than this server parses ({most}).", code="too_large")

    def _limit(self, path: str, headers: Headers) -> int:
        length = _content_length(headers)
        if length == 0 or (length is None and "transfer-encoding" not in headers):
            return 0
        kind = _content_type(headers)
        upload = kind == "multipart/form-data" and path == _UPLOAD_PATH
        if not upload and kind != "application/json":
            raise ApiError(
                415,
                "The content type is not supported; send the body as application/json.",
                code="unsupported_media_type",
            )
        if upload and length is None:
            raise ApiError(411, "An upload needs a Content-Length header.", code="length_required")
        limit = self._max_upload_bytes if upload else MAX_JSON_BYTES
        if length is not None and length > limit:
            raise _too_large(limit)
        return limit


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _encoding(headers: Headers, limit: int) -> str | None:
    """Return the encoding of a body that is to be decompressed. Raises 415 for one that the server does not read."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity" or limit == 0:
        return None
    if encoding not in _WINDOW_BITS or limit != MAX_JSON_BYTES:
        raise ApiError(
            415,
            "The content encoding is not supported; send JSON with gzip, deflate or without encoding.",
            code="unsupported_media_type",
            headers={"accept-encoding": ", ".join(_WINDOW_BITS)},
        )
    return encoding


def _decompressed(receive: Receive, encoding: str, limit: int) -> Receive:
    """Wrap `receive` so that it decompresses the body, and raises if that has more than `limit` bytes or is broken."""
    decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
    read, complete = 0, False

    async def decompressed_receive() -> Message:
        nonlocal read, complete
        message = await receive()
        if complete or message["type"] != "http.request":
            return message
        try:
            body = decompressor.decompress(message.get("body", b""), limit - read + 1)
        except zlib.error:
            raise _broken(encoding) from None
        read += len(body)
        if read > limit:
            raise _too_large(limit)
        complete = not message.get("more_body", False)
        if complete and not decompressor.eof:
            raise _broken(encoding)
        return {**message, "body": body}

    return decompressed_receive


def _broken(encoding: str) -> ApiError:
    return ApiError(400, f"The body is not valid {encoding}.", code="invalid_value")


def _content_length(headers: Headers) -> int | None:
    value = headers.get("content-length")
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise ApiError(400, "The Content-Length header is not a number.", code="invalid_value")
    return int(value)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body exceeds the limit of {limit} bytes.", code="too_large")


def _bounded(receive: Receive, limit: int, seconds: float) -> Receive:
    """Wrap `receive` so that it raises for a body of more than `limit` bytes, one that stops arriving, and one that has
    not arrived after `seconds`."""
    read, complete, deadline = 0, False, 0.0

    async def bounded_receive() -> Message:
        nonlocal read, complete, deadline
        deadline = deadline or asyncio.get_running_loop().time() + seconds
        message = await (receive() if complete else _receive_in_time(receive, deadline))
        complete = complete or not message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > limit:
            raise _too_large(limit)
        return message

    return bounded_receive


async def _receive_in_time(receive: Receive, deadline: float) -> Message:
    now = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(IDLE_SECONDS, max(0.0, deadline - now))):
            return await receive()
    except TimeoutError:
        idle = deadline - now > IDLE_SECONDS
        what = f"No data of the body arrived for {IDLE_SECONDS:g} seconds." if idle else "The body arrived too slowly."
        raise ApiError(408, what, code="timeout") from None


async def _collect(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that has the body as one message, and then what `receive` has: the end of the connection."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

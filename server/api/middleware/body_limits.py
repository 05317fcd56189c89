"""Limits on content types and body sizes, checked by the headers first and enforced again while the body is read."""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, error_response

MAX_JSON_BYTES = 4 << 20
IDLE_SECONDS = 30.0  # maximum time between two chunks of a body
_MULTIPART_OVERHEAD = 64 << 10  # boundaries and form fields around the files
_UPLOAD_PATH = "/v1/adapters"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's names for the formats


class BodyLimitsMiddleware:
    """Rejects requests by their headers before the body is read, and bodies that exceed the declared length."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int):
        self._app = app
        self._max_upload_bytes = max_upload_bytes + _MULTIPART_OVERHEAD

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            limit = self._limit(scope["path"], headers)
            encoding = _encoding(headers, limit)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            bounded = _bounded(receive, limit)
            await self._app(scope, bounded if encoding is None else _decompressed(bounded, encoding, limit), send)

    def _limit(self, path: str, headers: Headers) -> int:
        length = _content_length(headers)
        if length == 0 or (length is None and "transfer-encoding" not in headers):
            return 0
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
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


def _bounded(receive: Receive, limit: int) -> Receive:
    """Wrap `receive` so that it raises for a body of more than `limit` bytes, or one that stops arriving."""
    read, complete = 0, False

    async def bounded_receive() -> Message:
        nonlocal read, complete
        message = await (receive() if complete else _receive_in_time(receive))
        complete = complete or not message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > limit:
            raise _too_large(limit)
        return message

    return bounded_receive


async def _receive_in_time(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await receive()
    except TimeoutError:
        raise ApiError(408, f"No data of the body arrived for {IDLE_SECONDS:g} seconds.", code="timeout") from None

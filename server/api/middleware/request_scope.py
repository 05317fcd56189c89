"""The outermost middleware: request ids, a response to unexpected exceptions, request counts, and cancellation when
the client disconnects."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Iterable
from itertools import islice
from typing import TypeVar
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import reraise_unless_foreign
from server.api.errors import error_response, server_error
from server.metrics import UNKNOWN_LABEL, Metrics

T = TypeVar("T")

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_COUNTED_ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/generate", "/generate_stream"),
)
IGNORED_HEADER = "x-loraplex-ignored"  # fields of the request's body that have no effect
_MAX_NAMES, _MAX_NAME = 20, 64
_CLIENT_LEFT = 499  # for metrics only, as the client is gone


def _normalized(scope: Scope) -> Scope:
    """Return the scope without slashes at the end of the path, and with GET for HEAD, whose response lacks the body."""
    path = scope["path"].rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


class RequestMiddleware:
    """The outermost middleware, and the only place in the API that catches all exceptions."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        scope = _normalized(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)
        state["started"] = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if state.get("ignored"):
                    headers[IGNORED_HEADER] = ", ".join(state["ignored"])
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except BaseException as error:
            reraise_unless_foreign(error)
            log.exception("request %s failed", request_id)
            if status:
                raise  # the response is partly sent, so only a closed connection tells the client
            await error_response(server_error())(scope, receive, send_with_id)
        finally:
            self._count(scope, state.get("status", status))

    def _count(self, scope: Scope, status: int) -> None:
        if scope["path"] in _COUNTED_ROUTES:
            name = scope["state"].get("adapter")
            adapter = UNKNOWN_LABEL if name is None else self._metrics.label(name)
            self._metrics.requests.labels(adapter, scope["path"], str(status)).inc()


def ignored_names(names: Iterable[str]) -> list[str]:
    """Return the first names as a header may have them: its value may not end in a space, as it would with a name
    without characters."""
    return [quote(name, safe="[]", errors="replace")[:_MAX_NAME] or '""' for name in islice(names, _MAX_NAMES)]


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is safe in logs and headers, otherwise a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def unless_disconnected(receive: Receive, work: Awaitable[T], *signs: Awaitable[None]) -> T:
    """Run `work`; cancel it and raise `ClientDisconnect` when `receive` reports a disconnect or one of `signs` ends."""
    task = asyncio.ensure_future(work)
    watchers = [asyncio.ensure_future(sign) for sign in (_disconnected(receive), *signs)]
    try:
        await asyncio.wait({task, *watchers}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, *watchers):
            pending.cancel()
        await asyncio.gather(task, *watchers, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

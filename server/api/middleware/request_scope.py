"""What every request gets: an id, an answer whatever happens, a place in the metrics, and an end when its client
leaves."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, server_error
from server.metrics import UNKNOWN_LABEL, Metrics

T = TypeVar("T")

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_COUNTED_ROUTES = ("/v1/chat/completions", "/v1/completions")
_CLIENT_LEFT = 499  # for metrics only; there is nobody to send it to


class RequestMiddleware:
    """The outermost layer. It is the one place of the API that catches what nobody foresaw."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)
        state["started"] = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = _CLIENT_LEFT
        except Exception:
            log.exception("request %s failed", request_id)
            if status:
                raise  # the answer is half sent: only closing the connection tells the client
            await error_response(server_error())(scope, receive, send_with_id)
        finally:
            self._count(scope, state.get("status", status))

    def _count(self, scope: Scope, status: int) -> None:
        if scope["path"] in _COUNTED_ROUTES:
            name = scope["state"].get("adapter")
            adapter = UNKNOWN_LABEL if name is None else self._metrics.label(name)
            self._metrics.requests.labels(adapter, scope["path"], str(status)).inc()


def _request_id(scope: Scope) -> str:
    """The client's own id if it is harmless in logs and headers, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def unless_disconnected(receive: Receive, work: Awaitable[T], *signs: Awaitable[None]) -> T:
    """Run `work`, but cancel it and raise `ClientDisconnect` as soon as the client is gone, which `receive` says or
    the end of one of `signs`."""
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

"""Middleware that counts refused requests against the rate of their key: a wrong request costs the server as well."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, error_response
from server.api.middleware.auth import Key, need_of
from server.api.middleware.rate_limits import RateLimits


class RefusedRequestsMiddleware:
    """Charges requests of inference that end with a 4xx; those that begin are charged when they begin.

    A 429 is not charged, so that a client that obeys `Retry-After` is served.
    """

    def __init__(self, app: ASGIApp, rate_limits: Callable[[], RateLimits]):
        self._app = app
        self._rate_limits = rate_limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or need_of(scope["path"]) != "infer":
            await self._app(scope, receive, send)
            return
        key: Key = scope["state"]["key"]

        async def counting_send(message: Message) -> None:
            if 400 <= message.get("status", 0) < 500 and message["status"] != 429:
                self._rate_limits().count_refused(key.sha256, key.limits)
            await send(message)

        try:
            self._rate_limits().check_rate(key.sha256, key.limits)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, counting_send)

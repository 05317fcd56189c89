"""Protection against web pages: a browser on the server's machine or network sends whatever a page asks it to.

A page of another site is recognised by `Origin` and `Sec-Fetch-Site`, and a page whose name was pointed at this server
(DNS rebinding) by `Host`.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, error_response

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_WEIGHTS = re.compile(r"/v1/adapters/.+/files/[^/]+")
_FROM_HERE = ("same-origin", "none")  # "none": a bookmark, or typed by the user
_PORT = re.compile(r":\d*$")


class BrowserGuard:
    """Refuses requests under a foreign host name, and requests of other sites' pages that change something or read
    weights. `hosts` None: any host name, which is safe where every request needs an API key. `origins` are those whose
    pages are allowed, such as `https://example.com`."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str] = ()):
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(scope, Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and not is_allowed_host(host, self._hosts):
            raise ApiError(
                403,
                "The Host header does not name this server; start it with --allowed-host for other names.",
                code="host_not_allowed",
            )
        reads_only = scope["method"] in _SAFE_METHODS and not _WEIGHTS.fullmatch(scope["path"])
        if not reads_only and not comes_from_here(headers, self._origins):
            raise ApiError(403, "Pages of other sites may not send this request.", code="cross_site")


def is_allowed_host(host: str, allowed: Collection[str]) -> bool:
    """Return whether a Host header names a loopback address or one of `allowed`, with any port."""
    name = _PORT.sub("", host.lower()).strip("[]").removesuffix(".")
    return name in allowed or name == "localhost" or _is_loopback_address(name)


def comes_from_here(headers: Headers, origins: Collection[str]) -> bool:
    """Return whether no browser sent the request, or only for a page of this server or of one of `origins`."""
    origin = headers.get("origin")
    if origin is not None and ("*" in origins or origin in origins):
        return True
    if headers.get("sec-fetch-site", "none") not in _FROM_HERE:
        return False
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _is_loopback_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

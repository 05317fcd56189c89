"""Middleware that writes the audit log: changes through the API, and refused accesses."""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.middleware.auth import need_of
from server.audit import AuditLog

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_REFUSED = (401, 403)
_MOST_BYTES = 64 << 10  # of a response whose name and version are recorded


class AuditMiddleware:
    """Records requests that change something and those that were refused. It stands outside of authorization."""

    def __init__(self, app: ASGIApp, audit: AuditLog | None):
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._audit is None:
            await self._app(scope, receive, send)
            return
        is_change = scope["method"] not in _SAFE_METHODS and need_of(scope["path"]) in ("admin", "operate")
        status, body = 0, bytearray()

        async def listening_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif (is_change or status in _REFUSED) and len(body) < _MOST_BYTES:
                body.extend(message.get("body", b"")[:_MOST_BYTES])
            await send(message)

        try:
            await self._app(scope, receive, listening_send)
        finally:
            if is_change or status in _REFUSED:
                self._record(self._audit, scope, status, bytes(body))

    def _record(self, audit: AuditLog, scope: Scope, status: int, body: bytes) -> None:
        key = scope["state"].get("key")
        write = audit.refused if status in _REFUSED else audit.changed
        client = scope.get("client")
        write(
            key.name if key is not None else "",
            f"{scope['method']} {scope['path']}",
            tenant=key.tenant if key is not None else None,
            address=client[0] if client else None,
            request_id=scope["state"].get("request_id"),
            status=status,
            **_facts(body),
        )


def _facts(body: bytes) -> dict[str, Any]:
    """Return the name and version that a response states, or its error's code."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    error = found.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return {"adapter": found.get("name"), "version": found.get("version"), "code": code}

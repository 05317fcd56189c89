"""Authorization: API keys, scopes, and the middleware that checks them before the body is read."""

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import Request
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, error_response
from server.api.middleware.rate_limits import Limits
from server.config import ConfigError, ServeConfig
from server.keys_file import ALL_SCOPES, LEAST_BITS, KeyEntry, KeyScope, bits_of, digest_of, read_keys_file

Need = Literal["open", "known", "observe", "infer", "admin", "operate"]

log = logging.getLogger(__name__)

# Exact paths. Routes that are not listed need `admin`, so that a new route is closed until it is added here. What is no
# route needs a key of any kind, and then gets 404.
_NEEDS: dict[str, Need] = {
    "/": "open",
    "/livez": "open",
    "/readyz": "open",
    "/health": "open",
    "/metrics": "observe",
    "/version": "open",
    "/v1/stats": "observe",
    "/v1/stats/history": "observe",
    "/v1/trace": "observe",
    "/v1/usage": "observe",
    "/openapi.json": "observe",
    "/v1/models": "infer",
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
    "/v1/embeddings": "infer",
    "/score": "infer",
    "/v1/score": "infer",
    "/rerank": "infer",
    "/v1/rerank": "infer",
    "/v1/messages": "infer",
    "/v1/responses": "infer",
    "/generate": "infer",
    "/generate_stream": "infer",
    "/tokenize": "infer",
    "/detokenize": "infer",
    "/tokenizer_info": "infer",
    "/v1/merge": "operate",
    "/v1/keys": "operate",
    "/v1/keys/self": "known",
    "/pause": "operate",
    "/resume": "operate",
    "/is_paused": "observe",
    "/reset_prefix_cache": "operate",
}
_CONSOLE_FILE = re.compile(r"/console/[^/]+")


@dataclass(frozen=True, slots=True)
class Key:
    """An API key. `adapters` is the allow-list (None: all). Tenants have separate prefix caches and share the device in
    proportion to their weights."""

    name: str
    sha256: str
    scopes: frozenset[KeyScope]
    tenant: str = ""
    adapters: frozenset[str] | None = None
    weight: float = 1.0
    limits: Limits = Limits()
    expires: float | None = None  # Unix seconds
    max_adapters: int = 0  # of those that the key sees; 0 means no limit
    max_adapter_bytes: int = 0

    def sees(self, adapter: str) -> bool:
        return self.adapters is None or adapter in self.adapters

    def allows(self, need: Need) -> bool:
        """Return whether the key meets `need`. A key with an allow-list never meets `operate`: a merge affects all
        requests."""
        if need == "known":
            return True
        if need == "operate":
            return self.adapters is None and "admin" in self.scopes
        return need == "open" or need in self.scopes

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


ANYONE = Key("", "", ALL_SCOPES)


class KeyRing:
    """The configured API keys. A ring without a source requires no key, which is only allowed on loopback."""

    def __init__(self, keys: Sequence[Key] = (), file: Path | None = None):
        """`keys` stay as they are; those of `file` are read by `reload`."""
        self._fixed = tuple(keys)
        self._keys = self._fixed
        self._file = file
        self._seen: tuple[int, ...] | None = None

    @classmethod
    def load(cls, config: ServeConfig) -> "KeyRing":
        """Load the keys of `--api-key` and `--keys-file`. Raises `ConfigError` that names the unusable entry."""
        fixed = []
        if config.api_key:
            if bits_of(config.api_key) < LEAST_BITS:
                raise ConfigError(
                    f"--api-key has less than {LEAST_BITS} bits and could be guessed; `openssl rand -hex 32` makes one"
                )
            fixed.append(Key("api-key", digest_of(config.api_key), ALL_SCOPES, tenant="api-key"))
        ring = cls(fixed, config.keys_file if config.keys_file != Path() else None)
        ring.reload()
        return ring

    def reload(self) -> None:
        """Read the file again. Raises `ConfigError` and keeps the keys as they are if it is not usable."""
        if self._file is None:
            return
        self._seen = _signature(self._file)
        entries = read_keys_file(self._file)
        plain = [entry.name for entry in entries if entry.key is not None]
        if plain:
            log.warning(
                "%s has the secrets of %d keys in the clear; `loraplex keys hash %s` replaces them by digests",
                *(self._file, len(plain), self._file),
            )
        self._keys = (*self._fixed, *map(_as_key, entries))

    @property
    def has_file(self) -> bool:
        return self._file is not None

    @property
    def is_outdated(self) -> bool:
        """Return whether the file has changed since it was read."""
        return self._file is not None and _signature(self._file) != self._seen

    def __bool__(self) -> bool:
        """Return whether requests need a key."""
        return bool(self._fixed) or self._file is not None

    @property
    def listed(self) -> tuple[Key, ...]:
        return self._keys

    @property
    def tenants(self) -> set[str]:
        return {key.tenant for key in self._keys}

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret. Compares with every key in constant time, so that timing reveals nothing."""
        digest = digest_of(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def _as_key(entry: KeyEntry) -> Key:
    limits = Limits(entry.max_concurrent or 0, entry.requests_per_minute or 0, entry.tokens_per_minute or 0)
    expires = entry.expires.timestamp() if entry.expires else None
    return Key(
        *(entry.name, entry.digest, entry.scopes, entry.its_tenant, entry.adapters, entry.weight, limits, expires),
        max_adapters=entry.max_adapters or 0,
        max_adapter_bytes=entry.max_adapter_bytes or 0,
    )


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def check_bind(config: ServeConfig, keys: KeyRing) -> None:
    """Refuse to listen beyond loopback without API keys."""
    if not keys and not _is_loopback(config.host):
        raise ConfigError(f"--host {config.host} is reachable from other machines; set --api-key or --keys-file")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def need_of(path: str) -> Need:
    if _CONSOLE_FILE.fullmatch(path):
        return "open"
    return "infer" if path.startswith("/v1/models/") else _NEEDS.get(path, "admin")


class AuthMiddleware:
    """Checks the API key of every request. Pure ASGI, because FastAPI would read a whole upload before checking it."""

    def __init__(self, app: ASGIApp, keys: KeyRing, routes: Sequence[BaseRoute]):
        self._app = app
        self._keys = keys
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                self._authorize(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
            else:
                await self._app(scope, receive, send)

    def _need(self, scope: Scope) -> Need:
        need = need_of(scope["path"])
        if need != "admin" or any(route.matches(scope)[0] is not Match.NONE for route in self._routes):
            return need
        return "known"

    def _authorize(self, scope: Scope) -> None:
        """Put the caller's key into the request's state. Raises 401 or 403."""
        need = self._need(scope)
        if not self._keys or need == "open":
            scope["state"]["key"] = ANYONE
            return
        secret = _secret(Headers(scope=scope))
        key = None if secret is None else self._keys.find(secret)
        if key is None or key.is_expired:
            raise _no_valid_key("This API key has expired" if key else "A valid API key is required")
        scope["state"]["key"] = key  # also if it is refused: the audit log has its name
        if not key.allows(need):
            lacking = "admin, for all adapters" if need == "operate" else need
            raise ApiError(403, f"This API key lacks the scope for this route ({lacking}).", code="insufficient_scope")


def _secret(headers: Headers) -> str | None:
    """Return the secret that a request shows, as OpenAI's clients do or as Anthropic's do."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def _no_valid_key(why: str) -> ApiError:
    return ApiError(
        401,
        f"{why}; send the header 'Authorization: Bearer <key>'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


async def key_of(request: Request) -> Key:
    """Return the caller's API key; a dependency of routes."""
    key: Key = request.state.key
    return key

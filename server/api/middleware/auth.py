"""Authorization: API keys, scopes, and the middleware that checks them before the body is read."""

import hashlib
import hmac
import ipaddress
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from fastapi import Request
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, error_response
from server.api.middleware.rate_limits import Limits
from server.config import ConfigError, ServeConfig

KeyScope = Literal["infer", "admin"]
Need = Literal["open", "known", "observe", "infer", "admin", "operate"]

ALL_SCOPES: frozenset[KeyScope] = frozenset(get_args(KeyScope))
_NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]
_Limit = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)] | None

# Exact paths. Routes that are not listed need `admin`, so that a new route is closed until it is added here. What is no
# route needs a key of any kind, and then gets 404.
_NEEDS: dict[str, Need] = {
    "/livez": "open",
    "/readyz": "open",
    "/health": "open",
    "/metrics": "observe",
    "/version": "observe",
    "/v1/stats": "observe",
    "/openapi.json": "observe",
    "/v1/models": "infer",
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
    "/tokenize": "infer",
    "/detokenize": "infer",
    "/tokenizer_info": "infer",
    "/v1/merge": "operate",
}


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

    def sees(self, adapter: str) -> bool:
        return self.adapters is None or adapter in self.adapters

    def allows(self, need: Need) -> bool:
        """Return whether the key meets `need`. Keys with an allow-list never meet `observe` and `operate`: metrics name
        all adapters, and a merge affects all requests."""
        if need == "known":
            return True
        if need == "observe":
            return self.adapters is None
        if need == "operate":
            return self.adapters is None and "admin" in self.scopes
        return need == "open" or need in self.scopes


class _KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[keys]]` table of `--keys-file`."""

    name: _NonEmpty
    key: _NonEmpty | None = None
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    scopes: frozenset[KeyScope] = frozenset({"infer"})
    tenant: str | None = None
    adapters: frozenset[str] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0
    max_concurrent: _Limit = None
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None

    def as_key(self) -> Key:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"the key '{self.name}' must have either 'key' or 'sha256'")
        digest = self.sha256 or _digest(self.key or "")
        tenant = self.name if self.tenant is None else self.tenant
        limits = Limits(self.max_concurrent or 0, self.requests_per_minute or 0, self.tokens_per_minute or 0)
        return Key(self.name, digest, self.scopes, tenant, self.adapters, self.weight, limits)


class _KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: Annotated[list[_KeyEntry], msgspec.Meta(min_length=1)]


ANYONE = Key("", "", ALL_SCOPES)


class KeyRing:
    """The configured API keys. An empty ring requires no key, which is only allowed on loopback."""

    def __init__(self, keys: Sequence[Key] = ()):
        self._keys = tuple(keys)

    @classmethod
    def load(cls, config: ServeConfig) -> "KeyRing":
        """Load the keys of `--api-key` and `--keys-file`. Raises `ConfigError` that names the unusable entry."""
        keys = []
        if config.api_key:
            keys.append(Key("api-key", _digest(config.api_key), ALL_SCOPES, tenant="api-key"))
        if config.keys_file != Path():
            keys += _read_keys_file(config.keys_file)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def tenants(self) -> set[str]:
        return {key.tenant for key in self._keys}

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret. Compares with every key in constant time, so that timing reveals nothing."""
        digest = _digest(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def check_bind(config: ServeConfig, keys: KeyRing) -> None:
    """Refuse to listen beyond loopback without API keys."""
    if not keys and not _is_loopback(config.host):
        raise ConfigError(f"--host {config.host} is reachable from other machines; set --api-key or --keys-file")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _read_keys_file(path: Path) -> list[Key]:
    try:
        found = msgspec.convert(tomllib.loads(path.read_text()), _KeysFile)
        keys = [entry.as_key() for entry in found.keys]
        _check_weights(keys)
        return keys
    except (OSError, ValueError) as error:  # msgspec's and tomllib's errors are ValueErrors that name the place
        raise ConfigError(f"--keys-file {path} is not usable: {error}") from error


def _check_weights(keys: Sequence[Key]) -> None:
    weights = {key.tenant: key.weight for key in keys}
    for key in keys:
        if key.weight != weights[key.tenant]:
            raise ValueError(f"the keys of tenant '{key.tenant}' have different weights; give all the same weight")


def need_of(path: str) -> Need:
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
                scope["state"]["key"] = self._authorize(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
            else:
                await self._app(scope, receive, send)

    def _need(self, scope: Scope) -> Need:
        need = need_of(scope["path"])
        if need != "admin" or any(route.matches(scope)[0] is not Match.NONE for route in self._routes):
            return need
        return "known"

    def _authorize(self, scope: Scope) -> Key:
        need = self._need(scope)
        if not self._keys or need == "open":
            return ANYONE
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "A valid API key is required; send the header 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if not key.allows(need):
            raise ApiError(403, "This API key lacks the scope for this route.", code="insufficient_scope")
        return key


async def key_of(request: Request) -> Key:
    """Return the caller's API key; a dependency of routes."""
    key: Key = request.state.key
    return key

"""Who may call what: keys, scopes, and the middleware that decides before a byte of the body is read."""

import hashlib
import hmac
import ipaddress
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, error_response
from server.config import ConfigError, ServeConfig

KeyScope = Literal["infer", "admin"]
Need = Literal["open", "observe", "infer", "admin"]

ALL_SCOPES: frozenset[KeyScope] = frozenset(get_args(KeyScope))
_KEY_FIELDS = {"name", "key", "sha256", "scopes", "tenant", "adapters"}

# Exact paths. Whatever is not listed needs `admin`, so a new route is closed until someone opens it here.
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
}


@dataclass(frozen=True, slots=True)
class Key:
    """A caller. `adapters` of None sees all; `tenant` separates prefix caches."""

    name: str
    sha256: str
    scopes: frozenset[KeyScope]
    tenant: str = ""
    adapters: frozenset[str] | None = None

    def sees(self, adapter: str) -> bool:
        return self.adapters is None or adapter in self.adapters

    def allows(self, need: Need) -> bool:
        """`observe` is for every key but those with an allow-list: metrics and stats name all adapters."""
        if need == "observe":
            return self.adapters is None
        return need == "open" or need in self.scopes


ANYONE = Key("", "", ALL_SCOPES)


class KeyRing:
    """The configured keys. Empty means that no key is asked for, which only a loopback server may do."""

    def __init__(self, keys: Sequence[Key] = ()):
        self._keys = tuple(keys)

    @classmethod
    def load(cls, config: ServeConfig) -> "KeyRing":
        """Keys of `--api-key` and `--keys-file`. Raises `ConfigError` naming the entry that cannot be used."""
        keys = []
        if config.api_key:
            keys.append(Key("api-key", _digest(config.api_key), ALL_SCOPES, tenant="api-key"))
        if config.keys_file != Path():
            keys += _read_keys_file(config.keys_file)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, secret: str) -> Key | None:
        """Compares with every key in constant time, so that timing tells nothing about any of them."""
        digest = _digest(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def check_bind(config: ServeConfig, keys: KeyRing) -> None:
    """Refuse to listen beyond loopback while anyone could call everything."""
    if not keys and not _is_loopback(config.host):
        raise ConfigError(f"--host {config.host} is reachable by others: set --api-key or --keys-file first")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _read_keys_file(path: Path) -> list[Key]:
    try:
        entries = tomllib.loads(path.read_text()).get("keys", [])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys-file {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"--keys-file {path}: expected [[keys]] entries")
    return [_parse_key(entry, f"--keys-file {path}, entry {i + 1}") for i, entry in enumerate(entries)]


def _parse_key(entry: dict[str, Any], where: str) -> Key:
    unknown = set(entry) - _KEY_FIELDS
    if unknown:
        raise ConfigError(f"{where}: unknown field '{sorted(unknown)[0]}'")
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ConfigError(f"{where}: 'name' is missing")
    scopes = frozenset(entry.get("scopes", ["infer"]))
    if not scopes <= ALL_SCOPES:
        raise ConfigError(f"{where}: scopes are {', '.join(sorted(ALL_SCOPES))}")
    adapters = frozenset(entry["adapters"]) if "adapters" in entry else None
    tenant = str(entry.get("tenant", entry["name"]))
    return Key(entry["name"], _key_digest(entry, where), scopes, tenant, adapters)


def _key_digest(entry: dict[str, Any], where: str) -> str:
    if ("key" in entry) == ("sha256" in entry):
        raise ConfigError(f"{where}: give either 'key' or 'sha256'")
    if "key" in entry:
        if not entry["key"]:
            raise ConfigError(f"{where}: 'key' is empty")
        return _digest(str(entry["key"]))
    digest = str(entry["sha256"]).lower()
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(f"{where}: 'sha256' is not 64 hex digits")
    return digest


def need_of(path: str) -> Need:
    return "infer" if path.startswith("/v1/models/") else _NEEDS.get(path, "admin")


class AuthMiddleware:
    """Pure ASGI, so that a refusal costs nothing: FastAPI would read a whole upload before asking who sent it."""

    def __init__(self, app: ASGIApp, keys: KeyRing):
        self._app = app
        self._keys = keys

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

    def _authorize(self, scope: Scope) -> Key:
        need = need_of(scope["path"])
        if not self._keys or need == "open":
            return ANYONE
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "A valid API key is needed: send 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if not key.allows(need):
            raise ApiError(403, "This API key may not do that.", code="insufficient_scope")
        return key


async def key_of(request: Request) -> Key:
    """Dependency of routes that need to know the caller."""
    key: Key = request.state.key
    return key

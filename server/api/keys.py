"""`/v1/keys`: the API keys that this server knows, without their secrets. `loraplex keys` changes them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends

from server.api.context import Context
from server.api.errors import error_responses
from server.api.middleware.auth import ANYONE, Key, key_of
from server.api.middleware.rate_limits import Limits
from server.api.schemas import Wire
from server.keys_file import KeyScope

router = APIRouter(prefix="/v1/keys", tags=["operations"])
Caller = Annotated[Key, Depends(key_of)]


class KeyLimits(Wire):
    max_concurrent: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class KeyBody(Wire):
    name: str
    scopes: list[KeyScope]
    tenant: str
    adapters: list[str] | None  # the allow-list
    weight: float
    limits: KeyLimits
    expires: int | None
    expired: bool


class KeyList(Wire):
    object: Literal["list"] = "list"
    required: bool
    data: list[KeyBody]


class OwnKey(Wire):
    """The caller's key; null where the server asks for none, so that the caller may do everything."""

    required: bool
    key: KeyBody | None
    may: list[Literal["infer", "observe", "admin", "operate"]]


@router.get("", responses=error_responses(401, 403))
async def list_keys(context: Context) -> KeyList:
    """List the API keys with their scopes, adapters and limits, without secrets."""
    return KeyList(required=bool(context.keys), data=[_body(key) for key in context.keys.listed])


@router.get("/self", responses=error_responses(401))
async def own_key(context: Context, key: Caller) -> OwnKey:
    """Return the API key of this request and what it allows."""
    may: list[Literal["infer", "observe", "admin", "operate"]] = ["infer", "observe", "admin", "operate"]
    return OwnKey(
        required=bool(context.keys),
        key=None if key is ANYONE else _body(key),
        may=[need for need in may if key.allows(need)],
    )


def _body(key: Key) -> KeyBody:
    return KeyBody(
        name=key.name,
        scopes=sorted(key.scopes),
        tenant=key.tenant,
        adapters=None if key.adapters is None else sorted(key.adapters),
        weight=key.weight,
        limits=_limits(key.limits),
        expires=None if key.expires is None else int(key.expires),
        expired=key.is_expired,
    )


def _limits(limits: Limits) -> KeyLimits:
    """Return the limits of a key; a limit of 0 is none."""
    return KeyLimits(
        max_concurrent=limits.max_concurrent or None,
        requests_per_minute=limits.requests_per_minute or None,
        tokens_per_minute=limits.tokens_per_minute or None,
    )

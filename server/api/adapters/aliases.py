"""`/v1/adapters/{alias}/split`: aliases that split requests among several adapters by weight."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field, field_validator

from adapters.registry.aliases import Alias
from server.api.adapters.publishing import check_writable
from server.api.adapters.schemas import Name
from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_responses, model_not_found
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Wire

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
Caller = Annotated[Key, Depends(key_of)]
Weight = Annotated[int, Field(ge=0, le=1_000_000)]


class SplitRequest(Wire):
    weights: dict[Name, Weight] = Field(min_length=1, max_length=16, examples=[{"stable": 90, "canary": 10}])

    @field_validator("weights")
    @classmethod
    def _have_positive_sum(cls, weights: dict[str, int]) -> dict[str, int]:
        if not any(weights.values()):
            raise ValueError("at least one weight must be above 0")
        return weights


class AliasBody(Wire):
    name: str
    kind: Literal["alias"] = "alias"
    weights: dict[str, int]
    created: int


class UnsplitBody(Wire):
    name: str
    deleted: Literal[True] = True


def find(context: AppContext, key: Key, name: str) -> Alias:
    """Return the alias `name`. Raises 404 if it is unknown or the key may not see it and all its members."""
    alias = context.registry.aliases.get(name)
    if alias is None or not _sees(key, alias):
        raise model_not_found(name)
    return alias


def _sees(key: Key, alias: Alias) -> bool:
    return all(map(key.sees, (alias.name, *alias.weights)))


def alias_body(alias: Alias) -> AliasBody:
    return AliasBody(name=alias.name, weights=dict(alias.weights), created=alias.created)


@router.put("/{alias}/split", responses=error_responses(400, 401, 403, 404, 409, 413, 415, 507))
async def split_alias(alias: str, body: SplitRequest, context: Context, key: Caller) -> AliasBody:
    """Create or change an alias for several adapters by weight; requests of one `user` stay on one adapter."""
    check_writable(key, alias)
    known = context.registry.aliases.get(alias)
    if known is not None and not _sees(key, known):
        raise ApiError(403, "This API key may not change this alias.", code="insufficient_scope")
    for member in body.weights:
        if not key.sees(member):
            raise model_not_found(member)
    return alias_body(await asyncio.to_thread(context.registry.split, alias, body.weights))


@router.delete("/{alias}/split", responses=error_responses(401, 403, 404))
async def unsplit_alias(alias: str, context: Context, key: Caller) -> UnsplitBody:
    """Delete an alias; its members stay, and running requests continue."""
    find(context, key, alias)
    await asyncio.to_thread(context.registry.unsplit, alias)
    return UnsplitBody(name=alias)

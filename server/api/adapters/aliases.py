"""`/v1/aliases` and `/v1/adapters/{alias}/split`: aliases that split requests among several adapters by weight."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field, field_validator

from adapters.registry.aliases import BASE_MEMBER, Alias
from server.api.adapters.paths import ALIAS
from server.api.adapters.publishing import check_writable
from server.api.adapters.schemas import Name
from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_responses, model_not_found
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Wire

router = APIRouter(prefix="/v1", tags=["adapters"])
Caller = Annotated[Key, Depends(key_of)]
Weight = Annotated[int | float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class SplitRequest(Wire):
    weights: dict[Name, Weight] = Field(
        min_length=1,
        max_length=16,
        examples=[{"stable": 90, "canary": 10}, {"canary": 0.1, "base-model": 0.9}],
        description="Weight by adapter, in any unit; the base model may be a member",
    )

    @field_validator("weights")
    @classmethod
    def _have_positive_sum(cls, weights: dict[str, int | float]) -> dict[str, int | float]:
        if not any(weights.values()):
            raise ValueError("at least one weight must be above 0")
        return weights


class AliasBody(Wire):
    name: str
    kind: Literal["alias"] = "alias"
    weights: dict[str, int | float]
    created: int


class AliasList(Wire):
    object: Literal["list"] = "list"
    data: list[AliasBody]


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
    return all(map(key.sees, (alias.name, *(alias.weights.keys() - {BASE_MEMBER}))))


def alias_body(context: AppContext, alias: Alias) -> AliasBody:
    weights = {member or context.base_model: weight for member, weight in alias.weights.items()}
    return AliasBody(name=alias.name, weights=weights, created=alias.created)


@router.get("/aliases", responses=error_responses(401, 403))
async def list_aliases(context: Context, key: Caller) -> AliasList:
    """List the aliases that this API key may see with all their members."""
    seen = (alias for _, alias in sorted(context.registry.aliases.items()) if _sees(key, alias))
    return AliasList(data=[alias_body(context, alias) for alias in seen])


@router.put(f"/adapters{ALIAS}/split", responses=error_responses(400, 401, 403, 404, 409, 413, 415, 507))
async def split_alias(alias: str, body: SplitRequest, context: Context, key: Caller) -> AliasBody:
    """Create or change an alias for several adapters, or for the base model, by weight; requests of one `user` stay on
    one member."""
    check_writable(key, alias)
    known = context.registry.aliases.get(alias)
    if known is not None and not _sees(key, known):
        raise ApiError(403, "This API key may not change this alias.", code="insufficient_scope")
    weights = {BASE_MEMBER if name == context.base_model else name: weight for name, weight in body.weights.items()}
    for member in weights.keys() - {BASE_MEMBER}:
        if not key.sees(member):
            raise model_not_found(member)
    return alias_body(context, await asyncio.to_thread(context.registry.split, alias, weights))


@router.delete(f"/adapters{ALIAS}/split", responses=error_responses(401, 403, 404))
async def unsplit_alias(alias: str, context: Context, key: Caller) -> UnsplitBody:
    """Delete an alias; its members stay, and running requests continue."""
    find(context, key, alias)
    await asyncio.to_thread(context.registry.unsplit, alias)
    return UnsplitBody(name=alias)

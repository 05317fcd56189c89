"""`/v1/merge`: merges one adapter into the base model, so that its requests cost as much as those of the base model."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from adapters.registry.registry import AdapterRecord
from server.api.adapters import publishing
from server.api.adapters.schemas import Name
from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_responses
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Wire
from server.ipc.messages import AskedBy, MergeState

router = APIRouter(prefix="/v1/merge", tags=["adapters"])
Caller = Annotated[Key, Depends(key_of)]


class MergeRequest(Wire):
    name: Name
    drain: bool = Field(
        False, description="Wait for requests of other models to finish; without it, such requests cause 409"
    )
    allow_requantize: bool = Field(False, description="Keep a 4-bit base model in 4 bits if memory is short")


class MergeBody(Wire):
    state: MergeState
    adapter: str | None
    version: str | None
    asked_by: AskedBy | None
    requantized: bool
    policy: Literal["off", "auto"]
    others: Literal["wait", "refuse"]


@router.get("", responses=error_responses(401, 403))
async def get_merge(context: Context) -> MergeBody:
    """Return the adapter that is merged into the base model or is being merged."""
    return _body(context)


@router.post("", responses=error_responses(400, 401, 403, 404, 409, 413, 415, 422, 503))
async def merge_adapter(body: MergeRequest, context: Context, key: Caller) -> MergeBody:
    """Merge one adapter into the base model; the response is sent when the merge is complete."""
    record = publishing.find(context, key, body.name)
    await merge(context, record, drain=body.drain, allow_requantize=body.allow_requantize)
    return _body(context)


@router.delete("", responses=error_responses(401, 403, 503))
async def unmerge(context: Context) -> MergeBody:
    """Restore the base model's own weights, bit for bit; running requests continue."""
    await context.engine.unmerge()
    return _body(context)


async def merge(context: AppContext, record: AdapterRecord, *, drain: bool, allow_requantize: bool) -> None:
    """Merge an adapter into the base model. Raises `ApiError` 409, `AdapterMoveRefused`, `EngineUnavailable`."""
    traits = record.version.traits
    if not traits.mergeable:
        why = (
            "puts virtual tokens in front of the prompt" if traits.virtual_tokens else "changes more than linear layers"
        )
        raise ApiError(409, f"The adapter cannot be merged because it {why}.", code="conflict")
    if context.engine.merge_status.digest not in (None, record.version.digest):
        raise ApiError(409, "Another adapter is merged; unmerge it first.", code="conflict")
    context.metrics.add_adapter(record.name)
    await context.engine.merge(record.version.digest, drain=drain, allow_requantize=allow_requantize)


def _body(context: AppContext) -> MergeBody:
    status = context.engine.merge_status
    names = [] if status.digest is None else sorted(context.registry.names_of(status.digest))
    return MergeBody(
        state=status.state,
        adapter=names[0] if names else None,
        version=f"sha256:{status.digest}" if status.digest else None,
        asked_by=status.asked_by,
        requantized=status.requantized,
        policy=context.config.merge_policy,
        others=context.config.merge_others,
    )

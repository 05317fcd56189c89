"""`/v1/merge`: one adapter in the base's weights, so that its requests cost what the base's do."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from adapters.registry.registry import AdapterRecord
from server.api.adapters import publishing
from server.api.adapters.schemas import Name
from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_answers
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Wire
from server.ipc.messages import AskedBy, MergeState

router = APIRouter(prefix="/v1/merge", tags=["adapters"])
Caller = Annotated[Key, Depends(key_of)]


class MergeRequest(Wire):
    name: Name
    drain: bool = Field(False, description="Wait for other requests to end; without it their presence refuses this")
    allow_requantize: bool = Field(False, description="A 4-bit base may stay 4-bit where memory is short")


class MergeBody(Wire):
    state: MergeState
    adapter: str | None
    version: str | None
    asked_by: AskedBy | None
    requantized: bool
    policy: Literal["off", "auto"]
    others: Literal["wait", "refuse"]


@router.get("", responses=error_answers(401, 403))
async def get_merge(context: Context) -> MergeBody:
    """Which adapter is merged into the base's weights, or on its way."""
    return _body(context)


@router.post("", responses=error_answers(400, 401, 403, 404, 409, 413, 415, 422, 503))
async def merge_adapter(body: MergeRequest, context: Context, key: Caller) -> MergeBody:
    """Merge an adapter into the base's weights; the answer comes when it is done."""
    record = publishing.find(context, key, body.name)
    await merge(context, record, drain=body.drain, allow_requantize=body.allow_requantize)
    return _body(context)


@router.delete("", responses=error_answers(401, 403, 503))
async def unmerge(context: Context) -> MergeBody:
    """Put the base's own weights back, bit for bit; running requests go on."""
    await context.engine.unmerge()
    return _body(context)


async def merge(context: AppContext, record: AdapterRecord, *, drain: bool, allow_requantize: bool) -> None:
    """Raises `ApiError` 409, `AdapterMoveRefused`, `EngineUnavailable`."""
    if not record.version.traits.mergeable:
        raise ApiError(409, "The adapter changes more than linear layers and cannot be merged.", code="conflict")
    if context.engine.merge_status.digest not in (None, record.version.digest):
        raise ApiError(409, "Another adapter is merged; unmerge it first.", code="conflict")
    context.metrics.know(record.name)
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

"""vLLM's routes for trainers: pause and resume generation, and empty the prefix cache."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from server.api.context import Context
from server.api.errors import error_responses
from server.api.schemas import Wire

router = APIRouter(tags=["operations"])
_ERRORS = error_responses(400, 401, 403, 409, 503)


class PauseBody(Wire):
    status: Literal["paused", "resumed"]


class PausedBody(Wire):
    is_paused: bool


class ResetBody(Wire):
    success: Literal[True] = True


@router.post("/pause", responses=_ERRORS)
async def pause(
    context: Context,
    mode: Annotated[Literal["abort", "wait", "keep"], Query(description="What becomes of running requests")] = "abort",
    wait_for_inflight_requests: Annotated[bool, Query(description="vLLM's older name of mode=wait")] = False,
    clear_cache: Annotated[bool, Query(description="Empty the prefix cache, unless mode is keep")] = True,
) -> PauseBody:
    """Pause generation: end running requests (`abort`), let them finish (`wait`) or let them go on after `/resume`
    (`keep`). Later requests wait."""
    mode = "wait" if wait_for_inflight_requests else mode
    await context.engine.pause(mode)
    if clear_cache and mode != "keep":
        await context.engine.reset_prefix_cache()
    return PauseBody(status="paused")


@router.post("/resume", responses=_ERRORS)
async def resume(context: Context) -> PauseBody:
    """Resume generation after a pause."""
    await context.engine.resume()
    return PauseBody(status="resumed")


@router.get("/is_paused", responses=_ERRORS)
async def is_paused(context: Context) -> PausedBody:
    """Return whether generation is paused."""
    return PausedBody(is_paused=context.engine.is_paused)


@router.post("/reset_prefix_cache", responses=_ERRORS)
async def reset_prefix_cache(context: Context) -> ResetBody:
    """Empty the prefix cache. A new version of an adapter needs no reset, because prefixes are kept by version."""
    await context.engine.reset_prefix_cache()
    return ResetBody()

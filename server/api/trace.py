"""`/v1/trace`: what the engine does, step by step, as JSON lines. Nothing is recorded while nobody listens."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from server.api.context import AppContext, Context
from server.api.errors import error_responses, unavailable
from server.ipc.messages import StepOutputs

router = APIRouter(tags=["operations"])

_NDJSON = "application/x-ndjson"
_MAX_TRACES = 8  # at once: every one of them sees every step
_BEHIND = 4096  # lines; a reader that is further behind loses the rest
_GATHER_SECONDS = 0.1  # lines are sent together: sending costs ten times what a line does
_BEAT_SECONDS = 2.0  # between two lines of an idle engine, so that a reader knows that the server is there

_LINE = {
    "schema": {"type": "string", "description": "A JSON object in each line: run, step, move, merge, beat or lost"}
}
_encode = msgspec.json.Encoder().encode


@router.get(
    "/v1/trace",
    responses={200: {"content": {_NDJSON: _LINE}}, **error_responses(400, 401, 403, 503)},
    response_class=StreamingResponse,
)
async def trace(
    context: Context, seconds: Annotated[float, Query(gt=0, le=3600, allow_inf_nan=False)] = 10.0
) -> StreamingResponse:
    """Stream the engine's steps for some seconds: rows by adapter version, loads, evictions and merges."""
    if context.traces >= _MAX_TRACES:
        raise unavailable("Too many traces are being taken; try again later.", "traces_busy")
    return StreamingResponse(_lines(context, seconds), media_type=_NDJSON, headers={"cache-control": "no-store"})


async def _lines(context: AppContext, seconds: float) -> AsyncIterator[bytes]:
    """Yield a head, and the lines of every step until the time is over, the client leaves or the server drains."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_BEHIND)
    started = time.monotonic()
    ends = started + seconds

    def listen(step: StepOutputs) -> None:
        at = round(time.monotonic() - started, 6)
        for line in _lines_of(context, step):
            if not queue.full():
                queue.put_nowait({**line, "time": at})

    context.engine.add_listener(listen)
    context.traces += 1
    try:
        yield _line({"kind": "run", "base_model": context.base_model, "started": time.time(), "seconds": seconds})
        while (left := ends - time.monotonic()) > 0 and not context.draining:
            if queue.full():
                yield _line({"kind": "lost", "time": round(time.monotonic() - started, 6)})
                return
            try:
                async with asyncio.timeout(min(left, _BEAT_SECONDS)):
                    first = await queue.get()
                await asyncio.sleep(_GATHER_SECONDS)
            except TimeoutError:
                first = {"kind": "beat", "time": round(time.monotonic() - started, 6)}
            yield b"".join(map(_line, [first, *(queue.get_nowait() for _ in range(queue.qsize()))]))
    finally:
        context.engine.remove_listener(listen)
        context.traces -= 1


def _line(content: dict[str, Any]) -> bytes:
    return _encode(content) + b"\n"


def _lines_of(context: AppContext, step: StepOutputs) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {
            "kind": "move",
            "adapter": _names(context, move.digest),
            "version": move.digest[:12],
            "from": move.source,
            "to": move.target,
            "outcome": move.outcome,
            "seconds": round(move.seconds, 6),
        }
        for move in step.moves
    ]
    lines += [
        {"kind": "merge", "adapter": _names(context, s.digest), "direction": s.direction, "reason": s.reason}
        for s in step.switches
    ]
    return [*lines, _step_line(context, step)] if step.stats.batch_tokens else lines


def _step_line(context: AppContext, step: StepOutputs) -> dict[str, Any]:
    """Describe one step. `rows` counts the sequences that got a token, by model; its other tokens are prompts."""
    stats = step.stats
    return {
        "kind": "step",
        "step": stats.steps,
        "seconds": round(stats.step_seconds, 6),
        "tokens": stats.batch_tokens,
        "rows": dict(Counter(_model(context, output.seq_id) for output in step.outputs if output.token_ids)),
        "running": stats.running,
        "waiting": stats.waiting,
    }


def _model(context: AppContext, seq_id: str) -> str:
    """Return what computes a sequence as `name@version`; several adapters of one request are joined by `+`."""
    running = context.in_flight.running(seq_id)
    if running is None or not running.digests:
        return context.base_model
    # A request that switched to a new version holds the old one as well, which no name points to any more.
    versions = [digest for digest in running.digests if context.registry.names_of(digest)] or running.digests
    return f"{'+'.join(sorted(running.names))}@{'+'.join(sorted(digest[:12] for digest in versions))}"


def _names(context: AppContext, digest: str) -> str:
    """Return the names that point to a version, or its digest if none does any more."""
    return ",".join(context.registry.names_of(digest)) or digest[:12]

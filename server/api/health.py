"""Health probes, metrics, version and statistics."""

import asyncio
from heapq import nlargest
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

import server
from adapters.errors import AdapterNotFound
from adapters.tiers import Tier
from server.api.context import BASE_NAME, AppContext, Context
from server.api.errors import engine_unavailable, error_responses, unavailable
from server.api.schemas import Wire
from server.history import INTERVAL_SECONDS, Point
from server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


class StatusBody(Wire):
    status: str


class VersionInfo(Wire):
    version: str
    base_model: str
    base_fingerprint: str | None
    engine: dict[str, str]


class EngineNumbers(Wire):
    state: str
    restarts: int
    steps: int
    step_seconds: float
    batch_tokens: int
    batch_adapters: int


class QueueNumbers(Wire):
    running: int
    waiting: int
    limit: int


class CacheNumbers(Wire):
    blocks_used: int
    blocks_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int


class SlotNumbers(Wire):
    used: int
    pinned: int
    total: int


class TierNumbers(Wire):
    device: int
    host: int
    loading: int
    failed: int


class RegistryNumbers(Wire):
    adapters: int
    damaged: int
    set_aside: int


class AdapterNumbers(Wire):
    name: str
    tier: Tier
    in_flight: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    last_used: int | None


class Stats(Wire):
    base_model: str
    uptime_seconds: float
    engine: EngineNumbers
    queue: QueueNumbers
    kv_cache: CacheNumbers
    slots: SlotNumbers
    tiers: TierNumbers
    registry: RegistryNumbers
    adapters: list[AdapterNumbers]


class HistoryBody(Wire):
    """Columns of the last hour, oldest first; null where nothing happened that could be measured."""

    interval_seconds: float
    time: list[float]
    tokens_per_second: list[float]
    prompt_tokens_per_second: list[float]
    ttft_p50: list[float | None]
    ttft_p95: list[float | None]
    itl_p50: list[float | None]
    itl_p95: list[float | None]
    running: list[int]
    waiting: list[int]
    kv_cache_usage: list[float]
    batch_adapters: list[float | None]


@router.get("/livez", responses=error_responses(503))
async def livez(context: Context) -> StatusBody:
    """Liveness probe; 503 when the engine is dead or hung, or cannot be restarted."""
    if not context.engine.is_alive():
        raise unavailable("The engine is dead, hung or cannot be restarted; restart the server.", "engine_dead")
    return StatusBody(status="alive")


@router.get("/readyz", responses=error_responses(503))
@router.get("/health", responses=error_responses(503), operation_id="health")
async def readyz(context: Context) -> StatusBody:
    """Readiness probe; 503 when the server should receive no new requests."""
    if context.draining:
        raise unavailable("The server is shutting down.", "draining")
    if not context.startup.done:
        raise unavailable(f"The server is starting: {context.startup.progress()}.", "starting")
    if not context.ready:
        raise engine_unavailable(context.engine.state)
    if context.saturated:
        raise unavailable("Too many requests are waiting; try again later.", "queue_full")
    return StatusBody(status="ready")


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **error_responses(401, 403)})
async def metrics(context: Context) -> Response:
    """Return the metrics in the Prometheus text format."""
    return Response(await asyncio.to_thread(context.metrics.exposition), headers={"content-type": CONTENT_TYPE})


@router.get("/version", responses=error_responses(401, 403))
async def version(context: Context) -> VersionInfo:
    """Return the release, the base model and its fingerprint, precision and kernels."""
    info = context.engine.info
    return VersionInfo(
        version=server.__version__,
        base_model=context.base_model,
        base_fingerprint=info.base_fingerprint if info else None,
        engine=info.description if info else {},
    )


@router.get("/v1/stats", responses=error_responses(400, 401, 403))
async def stats(
    context: Context,
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    adapter: Annotated[str | None, Query(max_length=256)] = None,
) -> Stats:
    """Return statistics of the engine, queue, KV cache, adapter slots, registry and adapters.

    The adapters are all that were used, the `limit` busiest of them, or the one that `adapter` names.
    """
    now, residency = context.engine.stats, context.engine.residency
    return Stats(
        base_model=context.base_model,
        uptime_seconds=context.uptime(),
        engine=EngineNumbers(
            state=context.engine.state.value,
            restarts=context.engine.restarts,
            steps=now.steps,
            step_seconds=now.step_seconds,
            batch_tokens=now.batch_tokens,
            batch_adapters=now.batch_adapters,
        ),
        queue=QueueNumbers(running=now.running, waiting=now.waiting, limit=context.config.max_queue),
        kv_cache=CacheNumbers(
            blocks_used=now.blocks_used,
            blocks_total=now.blocks_total,
            prefix_queries=now.prefix_queries,
            prefix_hits=now.prefix_hits,
            preemptions=now.preemptions,
        ),
        slots=SlotNumbers(used=now.slots_used, pinned=now.slots_pinned, total=now.slots_total),
        tiers=TierNumbers(
            device=len(residency.device),
            host=len(residency.host),
            loading=len(residency.loading),
            failed=len(residency.failed),
        ),
        registry=RegistryNumbers(
            adapters=len(context.registry),
            damaged=len(context.registry.damaged),
            set_aside=len(context.registry.set_aside),
        ),
        adapters=[_adapter_numbers(context, name) for name in _chosen(context, limit, adapter)],
    )


@router.get("/v1/stats/history", responses=error_responses(400, 401, 403))
async def stats_history(
    context: Context, after: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0
) -> HistoryBody:
    """Return throughput, latencies, queue and KV cache over the last hour, or since `after` in Unix seconds."""
    points = [point for point in context.history.points if point.time > after]
    columns = {name: [getattr(point, name) for point in points] for name in Point._fields}
    return HistoryBody(interval_seconds=INTERVAL_SECONDS, **columns)


def _chosen(context: AppContext, limit: int | None, adapter: str | None) -> list[str]:
    """Return the names whose statistics are wanted, where "" is the base model."""
    uses = context.in_flight.uses
    if adapter is not None:
        name = BASE_NAME if adapter == context.base_model else adapter
        return [name] if name in uses else []
    if limit is None:
        return sorted(uses)
    return nlargest(limit, uses, key=lambda name: (uses[name].rate.current(), uses[name].last_used or 0))


def _adapter_numbers(context: AppContext, name: str) -> AdapterNumbers:
    use = context.in_flight.uses[name]
    return AdapterNumbers(
        name=name or context.base_model,
        tier=_tier(context, name),
        in_flight=context.in_flight.count(name),
        requests=use.requests,
        prompt_tokens=use.prompt_tokens,
        generated_tokens=use.generated_tokens,
        tokens_per_second=use.rate.current(),
        last_used=use.last_used,
    )


def _tier(context: AppContext, name: str) -> Tier:
    """Return the tier of an adapter. The base model, and an adapter that is being deleted, count as on the device."""
    try:
        return context.tier_of(context.registry.resolve(name).version.digest)
    except AdapterNotFound:
        return "device"

"""Health probes, metrics, version and statistics."""

import asyncio

from fastapi import APIRouter
from fastapi.responses import Response

import server
from adapters.errors import AdapterNotFound
from adapters.tiers import Tier
from server.api.context import AppContext, Context
from server.api.errors import engine_unavailable, error_responses, unavailable
from server.api.schemas import Wire
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


@router.get("/v1/stats", responses=error_responses(401, 403))
async def stats(context: Context) -> Stats:
    """Return statistics of the engine, queue, KV cache, adapter slots, registry and adapters."""
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
        adapters=[_adapter_numbers(context, name) for name in sorted(context.in_flight.uses)],
    )


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

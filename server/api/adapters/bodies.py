"""Response bodies that describe one adapter."""

import json

from adapters.records import AdapterRecord, HistoryEntry, PendingAdapter
from server.api.adapters.schemas import AdapterBody, State, Traffic, VersionBody
from server.api.adapters.settings import changed
from server.api.context import AdapterUse, AppContext


def record_body(context: AppContext, record: AdapterRecord) -> AdapterBody:
    version, use = record.version, context.in_flight.uses.get(record.name)
    state, error = state_of(context, record)
    return AdapterBody(
        name=record.name,
        version=f"sha256:{version.digest}",
        state=state,
        tier=context.tier_of(version.digest),
        pinned=record.pinned,
        base_model=context.base_model,
        rank=version.rank,
        target_modules=list(version.target_modules),
        bytes=version.nbytes,
        source=record.source,
        created=record.created,
        last_used=use.last_used if use else None,
        in_flight=context.in_flight.count(record.name),
        traffic=_traffic(use) if use else None,
        error=error,
        report=version.report,
        **record.settings,
    )


def _traffic(use: AdapterUse) -> Traffic:
    return Traffic(
        requests=use.requests,
        prompt_tokens=use.prompt_tokens,
        generated_tokens=use.generated_tokens,
        tokens_per_second=use.rate.current(),
    )


def version_body(context: AppContext, name: str, entry: HistoryEntry) -> VersionBody:
    stored = context.registry.version(name, entry.digest)
    return VersionBody(
        version=f"sha256:{entry.digest}",
        created=entry.created,
        current=entry.current,
        rank=stored.rank if stored else None,
        target_modules=list(stored.target_modules) if stored else None,
        bytes=stored.nbytes if stored else None,
        report=stored.report if stored else None,
    )


def state_of(context: AppContext, record: AdapterRecord) -> tuple[State, str | None]:
    """Return the state of a published adapter and its error."""
    residency, digest = context.engine.residency, record.version.digest
    damage, aside = context.registry.damaged.get(record.name), context.quarantine.reasons.get(digest)
    error = damage or residency.failed.get(digest) or aside
    if error is not None:
        return "failed", error
    pending = context.registry.pending.get(record.name)
    fetch_error = f"A new version could not be fetched: {pending.error}" if pending and pending.error else None
    return "loading" if digest in residency.loading else "ready", fetch_error


def pending_body(context: AppContext, adapter: PendingAdapter) -> AdapterBody:
    return AdapterBody(
        name=adapter.name,
        version=None,
        state=pending_state(adapter),
        tier="disk",
        pinned=False,
        base_model=context.base_model,
        rank=None,
        target_modules=[],
        bytes=0,
        source=adapter.source,
        created=adapter.created,
        last_used=None,
        in_flight=0,
        traffic=None,
        error=adapter.error,
        report={},
        **changed({}, json.loads(adapter.settings_json or "{}")),
    )


def pending_state(adapter: PendingAdapter) -> State:
    return "failed" if adapter.error else "registered"

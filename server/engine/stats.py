"""The engine's statistics at the end of a step: gauges, running totals, and the tiers of adapters."""

from collections.abc import Iterable
from typing import Any

from adapters.residency.residency import Residency
from server.engine.scheduling.scheduler import Scheduler
from server.ipc.messages import EngineStats, ResidencyReport
from server.model.graphs import DecodeGraphs
from server.sequence import ScheduledBatch, Sequence


def measure(
    scheduler: Scheduler,
    residency: Residency[Any],
    graphs: DecodeGraphs | None,
    batch: ScheduledBatch,
    steps: int,
    seconds: float,
) -> EngineStats:
    """Return the statistics after the step of `batch`, which took `seconds`; `steps` is the number of steps so far."""
    blocks, slots = scheduler.blocks, residency.slots
    return EngineStats(
        steps=steps,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        blocks_used=blocks.num_used,
        blocks_total=blocks.num_blocks,
        prefix_queries=blocks.prefix_queries,
        prefix_hits=blocks.prefix_hits,
        preemptions=scheduler.preemptions,
        graph_steps=graphs.replayed if graphs else 0,
        eager_steps=dict(graphs.skipped) if graphs else {},
        slots_used=len(slots.slots()),
        slots_pinned=len(residency.pinned()),
        slots_total=slots.num_slots,
        step_seconds=seconds if batch else 0.0,
        batch_tokens=batch.num_tokens,
        batch_adapters=batch.num_adapters,
        running_adapters=sorted(digests_of(scheduler.running)),
        waiting_adapters=sorted(digests_of(scheduler.waiting)),
    )


def describe(residency: Residency[Any]) -> ResidencyReport:
    slots = residency.slots.slots()
    return ResidencyReport(
        device=[slot.digest for slot in slots if slot.ready],
        host=residency.host.digests(),
        loading=residency.loading(),
        pinned=residency.pinned(),
        failed=residency.failures(),
    )


def digests_of(sequences: Iterable[Sequence]) -> set[str]:
    return {adapter.digest for seq in sequences for adapter in seq.adapters}

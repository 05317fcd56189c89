"""The engine's books as a whole: what its parts state about the same things agrees. Tests check it between steps."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from adapters.residency.residency import Residency
from server.engine.scheduling.scheduler import Scheduler
from server.sequence import SequenceStatus


def check_integrity(
    scheduler: Scheduler, residency: Residency[Any], extra_bytes: Mapping[int, int], sequences: Iterable[str]
) -> None:
    """Raise AssertionError when any of the books do not balance. `sequences` are those that have not ended."""
    running = scheduler.running
    scheduler.blocks.check_integrity(running)
    for seq in running:
        assert seq.status is SequenceStatus.RUNNING
        assert seq.slots or not seq.adapters or scheduler.gate.in_base(seq)
    references = Counter(digest for seq in running if seq.slots for digest in seq.digests)
    residency.check_integrity(references, extra_bytes)
    assert {seq.seq_id for seq in [*running, *scheduler.waiting]} == set(sequences)

"""Isolation of the sequences that make a step raise: they end with an error, and the others go on."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from server.engine.faults import MAX_FAILED_STEPS, EngineBroken, is_lost
from server.engine.pipeline import InFlightStep
from server.model.sampling.sampler import Sample
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Isolation:
    """Computes a failed step again in halves, by the engine's own methods, until the sequences that fail are alone."""

    device: torch.device
    block_size: int
    forward: Callable[[ScheduledBatch], InFlightStep]
    advance: Callable[[InFlightStep], None]
    take_all: Callable[[ScheduledBatch, list[Sample]], None]
    abandon: Callable[[Sequence, str], None]
    is_live: Callable[[Sequence], bool]
    failed_steps: int = 0  # in a row, of which no sequence could be computed

    def isolate(self, step: InFlightStep, later: Iterable[InFlightStep], failure: Exception) -> None:
        """End the sequences of a failed step that fail alone; the others go on. `later` steps were launched after it
        and are dropped. Raises `EngineBroken` if the device is lost, or if too many steps failed."""
        log.error("a step of %d sequences failed", len(step.batch.sequences), exc_info=failure)
        self._check_device([scheduled for each in (step, *later) for scheduled in each.batch.sequences])
        if self._compute_apart([found for found in step.batch.sequences if self._goes_back(found)]):
            self.failed_steps = 0
            return
        self.failed_steps += 1
        if self.failed_steps >= MAX_FAILED_STEPS:
            raise EngineBroken(f"{self.failed_steps} steps in a row failed")

    def _goes_back(self, scheduled: ScheduledSequence) -> bool:
        """Bring a sequence to where it was before a step that failed. Returns False if it is not to be computed again:
        it has ended, or it was preempted, so that the scheduler will compute it again."""
        seq, before, end = scheduled.seq, scheduled.copied_from, scheduled.end
        if not self.is_live(seq):
            return False
        if scheduled.samples:
            del seq.token_ids[end:]  # a placeholder
        if len(seq.block_table) * self.block_size < end or seq.num_computed_tokens not in (before, end):
            return False
        seq.num_computed_tokens = before
        return True

    def _compute_apart(self, sequences: list[ScheduledSequence]) -> bool:
        """Return whether any of the sequences, which failed together, could be computed."""
        if len(sequences) == 1:
            self.abandon(sequences[0].seq, "the engine failed to compute this step")
        if len(sequences) <= 1:
            return False
        middle = len(sequences) // 2
        return any([self._compute_again(half) for half in (sequences[:middle], sequences[middle:])])

    def _compute_again(self, sequences: list[ScheduledSequence]) -> bool:
        batch = ScheduledBatch(sequences)
        try:
            step = self.forward(batch)
            step.sample()
            samples = step.collect()
        except Exception:
            self._check_device(sequences)
            return self._compute_apart(sequences)
        self.advance(step)
        self.take_all(batch, samples)
        return True

    def _check_device(self, sequences: list[ScheduledSequence]) -> None:
        """End the sequences of a step that failed, and raise `EngineBroken`, if the device is lost. Which of several
        sequences is the cause cannot be found out any more."""
        if not is_lost(self.device):
            return
        live = {scheduled.seq: None for scheduled in sequences if self.is_live(scheduled.seq)}
        for seq in live:
            alone = "the engine failed to compute this step"
            beside = "the device failed in a step of several requests, of which any may be the cause"
            self.abandon(seq, (alone if len(live) == 1 else beside) + "; the engine restarts")
        raise EngineBroken("the device is lost")

"""A step that was launched and whose tokens have not been collected. (That the next step is put together while the
device computes this one, with tokens that the host has yet to see, is vLLM's asynchronous scheduling.)"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.model.sampling.sampler import Sample, Started
from server.sequence import ScheduledBatch, Sequence

PLACEHOLDER = 0  # stands in `token_ids` for a token that is on the device only


@dataclass(slots=True)
class InFlightStep:
    """The model is launched; `start_sampling` queues the choice of the tokens, for which a row with a grammar needs its
    last token. After that, `tokens` `[samples]` are those of `batch`, on the device (-1: the numbers were not finite),
    and `collect` waits for them; it raises what went wrong, in the launch or on the device.

    `placeholders` are the sequences whose last token is one of `tokens`, by its place there.
    """

    batch: ScheduledBatch
    start_sampling: Callable[[], Started] | None  # None once it was called, so that the logits are released
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    collect: Callable[[], list[Sample]] = list
    placeholders: dict[Sequence, int] = field(default_factory=dict)
    failed: bool = False  # in the launch: nothing was computed
    launched: float = 0.0  # when its launch began, in seconds of `perf_counter`

    def sample(self) -> None:
        """Queue the choice of the tokens, unless that was done. If it fails, collecting the step raises the error."""
        start, self.start_sampling = self.start_sampling, None
        if start is None:
            return
        try:
            started = start()
            self.tokens, self.collect = started.tokens, started.collect
        except Exception as error:
            self.failed, self.collect = True, _raising(error)


def failed_step(batch: ScheduledBatch, error: Exception) -> InFlightStep:
    """The step of a batch whose launch raised `error`."""
    return InFlightStep(batch, None, collect=_raising(error), failed=True)


def _raising(error: Exception) -> Callable[[], list[Sample]]:
    def collect() -> list[Sample]:
        raise error

    return collect

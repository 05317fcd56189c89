"""A step that was launched and whose tokens have not been collected. (That the next step is put together while the
device computes this one, with tokens that the host has yet to see, is vLLM's asynchronous scheduling.)"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.model.sampling.sampler import Sample, Started
from server.sequence import ScheduledBatch, Sequence

PLACEHOLDER = 0  # stands in `token_ids` for a token that is on the device only


def _no_tokens() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(slots=True)
class InFlightStep:
    """The model is launched; `start_sampling` queues the choice of the tokens, for which a row with a grammar needs its
    last token. After that, `tokens` `[samples]` are those of `batch`, on the device (-1: the numbers were not finite),
    and `collect` waits for them; it raises what went wrong, in the launch or on the device.

    `placeholders` are the sequences whose last token is one of `tokens`, by its place there.
    """

    batch: ScheduledBatch
    start_sampling: Callable[[], Started] | None  # None once it was called, so that the logits are released
    tokens: torch.Tensor = field(default_factory=_no_tokens)
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
        except Exception as error:
            self.fail(error)
            return
        self.tokens, self.collect = started.tokens, started.collect

    def fail(self, error: Exception) -> None:
        def collect() -> list[Sample]:
            raise error

        self.failed, self.collect = True, collect


def failed_step(batch: ScheduledBatch, error: Exception) -> InFlightStep:
    """The step of a batch whose launch raised `error`."""
    step = InFlightStep(batch, None)
    step.fail(error)
    return step

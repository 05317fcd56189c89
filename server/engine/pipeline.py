"""A step that was launched and whose tokens have not been collected. (That the next step is put together while the
device computes this one, with tokens that the host has yet to see, is vLLM's asynchronous scheduling.)"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.model.sampling.sampler import Sample
from server.sequence import ScheduledBatch, Sequence

PLACEHOLDER = 0  # stands in `token_ids` for a token that is on the device only


@dataclass(slots=True)
class InFlightStep:
    """`tokens` `[samples]` are those of `batch`, on the device (-1: the numbers were not finite). `collect` waits for
    them; it raises what went wrong, in the launch or on the device.

    `placeholders` are the sequences whose last token is one of `tokens`, by its place there.
    """

    batch: ScheduledBatch
    tokens: torch.Tensor
    collect: Callable[[], list[Sample]]
    placeholders: dict[Sequence, int] = field(default_factory=dict)
    failed: bool = False  # in the launch: nothing was computed
    launched: float = 0.0  # when its launch began, in seconds of `perf_counter`


def failed_step(batch: ScheduledBatch, error: Exception) -> InFlightStep:
    """The step of a batch whose launch raised `error`."""

    def collect() -> list[Sample]:
        raise error

    return InFlightStep(batch, torch.empty(0, dtype=torch.int64), collect, failed=True)

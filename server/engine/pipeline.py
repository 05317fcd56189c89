"""A step that was launched and whose tokens have not been collected. (That the next step is put together while the
device computes this one, with tokens that the host has yet to see, is vLLM's asynchronous scheduling.)"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.model.sampling.sampler import Sample
from server.sequence import ScheduledBatch, Sequence

UNSEEN = 0  # stands for a token that is on the device only, in `token_ids`


@dataclass(slots=True)
class Flight:
    """`tokens` `[samples]` are those of `batch`, on the device (-1: not finite); the call of `collect` waits for them.

    `unseen` are the sequences whose last token is one of them, by its place there.
    """

    batch: ScheduledBatch
    tokens: torch.Tensor
    collect: Callable[[], list[Sample]]
    unseen: dict[Sequence, int] = field(default_factory=dict)

"""Embeddings: the final hidden states of prompts, pooled. They are those that the output head gets, after the last
norm.

A prompt may take several steps; the sums of its parts are added on the host, in the order of the steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.device.transfers import download
from server.model.batch import ForwardBatch
from server.model.pooled_tokens import pooled_tokens
from server.model.sampling.sampler import Sample
from server.sequence import ScheduledSequence, Sequence

Collect = Callable[[], list[Sample]]


@contextmanager
def pooling(model: Any, batch: ForwardBatch) -> Iterator[None]:
    """Have the forward pass of `model` within leave the sums of the batch's pooled rows in `batch.pooled`. A step
    without such rows runs without a hook."""
    if not batch.pooled_rows:
        yield
        return

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        batch.pooled = _sums(output.last_hidden_state[0], batch.pooled_rows)

    hook = model.base_model.register_forward_hook(keep)  # of the model without its head
    try:
        yield
    finally:
        hook.remove()


def _sums(hidden: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.Tensor:
    return torch.stack([hidden[start:end].sum(0, dtype=torch.float32) for start, end in ranges])


def start_collecting(sums: torch.Tensor | None, sequences: list[ScheduledSequence]) -> Callable[[Collect], Collect]:
    """Queue the copy of a step's `sums` to the host. Returns a wrapper of the function that collects the step: it first
    adds the sums to their sequences."""
    if sums is None:
        return lambda collect: collect
    arrived = download(sums)
    pooled = [scheduled for scheduled in sequences if pooled_tokens(scheduled)]

    def collect_both(collect: Collect) -> list[Sample]:
        for scheduled, row in zip(pooled, arrived().numpy(), strict=True):
            _add(scheduled, row)
        return collect()

    return lambda collect: partial(collect_both, collect)


def _add(scheduled: ScheduledSequence, row: NDArray[np.float32]) -> None:
    """Add the sum of a part. The first part begins anew, because a sequence may be computed again from there; a part
    that does not follow the last one belongs to a computation that was given up."""
    seq, part = scheduled.seq, pooled_tokens(scheduled)
    if seq.sampling.pooling == "last" or part.start == seq.num_virtual_tokens:
        seq.pooled, seq.pooled_to = row.copy(), part.stop
    elif seq.pooled is not None and part.start == seq.pooled_to:
        seq.pooled, seq.pooled_to = seq.pooled + row, part.stop


def has_finite_pool(seq: Sequence) -> bool:
    return seq.pooled is None or bool(np.isfinite(seq.pooled).all())


def embedding_of(seq: Sequence) -> bytes | None:
    """Return the embedding of a prompt that is computed, as float32; None if none was asked for."""
    if seq.pooled is None:
        return None
    assert seq.pooled_to == seq.num_prompt_tokens
    count = 1 if seq.sampling.pooling == "last" else seq.num_prompt_tokens - seq.num_virtual_tokens
    embedding: NDArray[np.float32] = seq.pooled / np.float32(count)
    return embedding.tobytes()

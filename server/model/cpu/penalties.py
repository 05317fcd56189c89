"""Penalties in one pass over the logits; torch takes several, and a copy of the counts."""

import torch

from server.model.cpu.library import function


def penalize(
    logits: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, strengths: torch.Tensor
) -> None:
    """Apply penalties to the `rows` `[n]` int64 of `logits` `[*, vocab]` float32 in place. `slots` `[n]` int64 are the
    rows of `counts` `[*, at least vocab]` int32 (see `server.model.sampling.token_counts`); `strengths` `[3, n]`
    float32 are the repetition, frequency and presence penalties."""
    assert logits.is_contiguous() and counts.is_contiguous() and counts.shape[1] >= logits.shape[1]
    function("penalize", logits.dtype)(
        logits.data_ptr(), logits.shape[1], counts.data_ptr(), counts.shape[1], rows.data_ptr(), slots.data_ptr(),
        strengths.contiguous().data_ptr(), len(rows), torch.get_num_threads(),
    )  # fmt: skip

"""Greedy sampling in one pass over the logits, where torch takes four and a copy in float32."""

import torch

from server.model.cpu.library import function


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the likeliest tokens of each row of `logits` `[rows, vocab]`: `[rows]` int64, -1 where a number is
    not finite."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    chosen = torch.empty(rows, dtype=torch.int64)
    function("likeliest", logits.dtype)(
        chosen.data_ptr(), logits.data_ptr(), rows, vocab, torch.get_num_threads()
    )  # fmt: skip
    return chosen

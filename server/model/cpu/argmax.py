"""Greedy sampling in one pass over the logits; torch takes four passes and a float32 copy."""

import torch

from server.model.cpu.library import function


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first of the most probable tokens of each row of `logits` `[rows, vocab]`: `[rows]` int64, -1 if the
    row is not finite."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    chosen = torch.empty(rows, dtype=torch.int64)
    function("argmax", logits.dtype)(
        chosen.data_ptr(), logits.data_ptr(), rows, vocab, torch.get_num_threads()
    )  # fmt: skip
    return chosen

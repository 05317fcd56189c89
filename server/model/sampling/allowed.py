"""The tokens that grammars allow for a step's rows."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from server.model.sampling.categorical import Array


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The host's part: `rows` `[n]` int64 are places in the logits, `masks` `[n, bytes]` uint8 have one bit for each
    token, lowest bit first. A token beyond the masks is not allowed."""

    rows: Array
    masks: Array

    @classmethod
    def none(cls) -> "AllowedTokens":
        """Return the masks of a step in which no row has a grammar."""
        return cls(np.zeros(0, np.int64), np.zeros((0, 0), np.uint8))

    def tables(self, vocab_size: int) -> list[Array]:
        """Return the arrays to upload, with masks over the whole vocabulary."""
        masks = np.zeros((len(self.rows), -(-vocab_size // 8)), np.uint8)
        width = min(self.masks.shape[1], masks.shape[1])
        masks[:, :width] = self.masks[:, :width]
        return [self.rows, masks]


@dataclass(frozen=True, slots=True)
class Allowed:
    """`AllowedTokens` on the device."""

    rows: torch.Tensor
    masks: torch.Tensor

    def keep(self, logits: torch.Tensor) -> None:
        """Set the logits `[rows, vocab]` float32 of all other tokens to minus infinity, in place."""
        bias = _biases(logits.device).index_select(0, self.masks.flatten().int()).view(len(self.rows), -1)
        logits.index_add_(0, self.rows, bias[:, : logits.shape[1]])


@cache
def _biases(device: torch.device) -> torch.Tensor:
    """Return what a byte of a mask adds to the logits of its eight tokens, `[256, 8]` float32."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, 0.0, -np.inf).astype(np.float32)).to(device)

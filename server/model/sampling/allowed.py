"""The tokens that grammars allow for a step's rows."""

from dataclasses import dataclass

import numpy as np
import torch

from server.model.sampling.categorical import Array

_BITS = tuple(1 << bit for bit in range(8))


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The host's part: `rows` `[n]` int64 are places in the logits, `masks` `[n, bytes]` uint8 have one bit for each
    token, lowest bit first. A token beyond the masks is not allowed."""

    rows: Array
    masks: Array

    @classmethod
    def none(cls) -> "AllowedTokens":
        """No row has a grammar."""
        return cls(np.zeros(0, np.int64), np.zeros((0, 0), np.uint8))


@dataclass(frozen=True, slots=True)
class Allowed:
    """`AllowedTokens` on the device."""

    rows: torch.Tensor
    masks: torch.Tensor

    def keep(self, logits: torch.Tensor) -> None:
        """Set the logits `[rows, vocab]` of all other tokens to minus infinity, in place."""
        bits = torch.tensor(_BITS, dtype=torch.uint8, device=logits.device)
        allowed = (self.masks[:, :, None] & bits).bool().flatten(1)[:, : logits.shape[1]]
        known = logits[self.rows, : allowed.shape[1]]
        logits[self.rows] = -torch.inf
        logits[self.rows, : allowed.shape[1]] = known.masked_fill(~allowed, -torch.inf)

"""Occurrences of tokens in the sequences whose sampling has penalties. They stay on the device, where every step adds
the sampled tokens; the host reads a sequence's history only once."""

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from server.model.sampling.categorical import Array
from server.sequence import Sequence

# An entry is OUTPUT times the token's occurrences in the output, plus IN_PROMPT if the prompt has the token.
IN_PROMPT, OUTPUT = 1, 2
_LEAST_SLOTS = 4


@dataclass(slots=True)
class _Counted:
    """A row of the table, and the number of tokens that it counts."""

    slot: int
    num_tokens: int = -1


class TokenCounts:
    """`table` `[slots, vocab]` int32 has a row for each sequence that `prepare` has met and that still exists."""

    def __init__(self, device: torch.device):
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._counted: weakref.WeakKeyDictionary[Sequence, _Counted] = weakref.WeakKeyDictionary()
        self._free: list[int] = []

    def prepare(self, seqs: list[Sequence], vocab_size: int) -> tuple[Array, Array, Array]:
        """Return the slots of `seqs`, of which each is about to be given one token, and slots with the entries to
        `write` there: of sequences that are new, or whose tokens are not those that were added (a step has failed)."""
        self._make_room(sum(seq not in self._counted for seq in seqs), vocab_size)
        counted = [self._counted_of(seq) for seq in seqs]
        stale = [seq for seq, found in zip(seqs, counted, strict=True) if found.num_tokens != seq.num_tokens]
        for seq, found in zip(seqs, counted, strict=True):
            found.num_tokens = seq.num_tokens + 1
        entries = [_entries(seq, self.table.shape[1]) for seq in stale]
        return (
            np.array([found.slot for found in counted], dtype=np.int64),
            np.array([self._counted[seq].slot for seq in stale], dtype=np.int64),
            np.array(entries, dtype=np.int32).reshape(len(stale), self.table.shape[1]),
        )

    def write(self, slots: torch.Tensor, entries: torch.Tensor) -> None:
        """Write `entries` `[slots, vocab]` to the table."""
        if len(slots):
            self.table.index_copy_(0, slots, entries)

    def add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add one sampled token to each of `slots`. A token of -1 ends its sequence, so its count does not matter."""
        one = torch.full_like(tokens, OUTPUT, dtype=torch.int32)
        self.table.index_put_((slots, tokens.clamp(min=0)), one, accumulate=True)

    def _counted_of(self, seq: Sequence) -> _Counted:
        found = self._counted.get(seq)
        if found is None:
            found = self._counted[seq] = _Counted(self._free.pop())
            weakref.finalize(seq, self._free.append, found.slot).atexit = False
        return found

    def _make_room(self, num_new: int, vocab_size: int) -> None:
        slots, width = self.table.shape
        missing = max(num_new - len(self._free), 0)
        if not missing and vocab_size <= width:
            return
        more = max(missing, slots, _LEAST_SLOTS) if missing else 0  # the table doubles, so that it seldom grows
        grown = self.table.new_zeros(slots + more, max(vocab_size, width))
        grown[:slots, :width] = self.table
        self.table = grown
        self._free += reversed(range(slots, slots + more))


def _entries(seq: Sequence, vocab_size: int) -> Array:
    """Return the entries of one sequence, `[vocab_size]` int32."""
    entries = OUTPUT * np.bincount(
        np.array(seq.token_ids[seq.num_prompt_tokens :], dtype=np.int64), minlength=vocab_size
    )
    entries[seq.token_ids[seq.num_virtual_tokens : seq.num_prompt_tokens]] += IN_PROMPT
    return entries.astype(np.int32)

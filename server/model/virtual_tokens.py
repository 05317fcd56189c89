"""The virtual tokens of a step: embeddings for the rows that stand for them, and prefixes copied into the KV cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapters.device.transfers import upload
from adapters.runtime.virtual_tokens import VirtualTable
from server.model.kv_cache import KVCache
from server.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class VirtualSpan:
    """Virtual tokens `[start, end)` of the adapter in `slot`."""

    slot: int
    start: int
    end: int


@dataclass(slots=True)
class VirtualRows:
    """The spans that are rows of the step, each with its first row, and the spans of prefixes, with the slots of the
    KV cache `[end - start]` (int64) that their keys and values are copied to."""

    embedded: list[tuple[VirtualSpan, int]] = field(default_factory=list)
    copied: list[tuple[VirtualSpan, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: Iterable[ScheduledSequence], block_size: int, device: torch.device) -> "VirtualRows":
        """Find the virtual tokens of a step."""
        found, row = cls(), 0
        for scheduled in sequences:
            seq, start = scheduled.seq, scheduled.start
            if start < seq.num_virtual_tokens:
                span = VirtualSpan(seq.slots[0], start, min(scheduled.end, seq.num_virtual_tokens))
                found.embedded.append((span, row))
            if scheduled.copied_from < start:
                span = VirtualSpan(seq.slots[0], scheduled.copied_from, start)
                positions = np.arange(span.start, span.end)
                slots = np.asarray(seq.block_table)[positions // block_size] * block_size + positions % block_size
                found.copied.append((span, upload(slots.astype(np.int64), device)))
            row += scheduled.num_new_tokens
        return found

    def copy(self, table: VirtualTable, cache: KVCache) -> None:
        """Copy the prefixes' keys and values from their adapters into the blocks of the sequences."""
        for span, cache_slots in self.copied:
            for layer, (keys, values) in enumerate(table[span.slot][:, :, span.start : span.end]):
                cache.write(layer, keys, values, cache_slots)

    def model_input(self, input_ids: torch.Tensor, table: VirtualTable, embedding: Any) -> dict[str, torch.Tensor]:
        """Return the model's input: the step's tokens or, where virtual ones are among them, the embeddings of all."""
        if not self.embedded:
            return {"input_ids": input_ids[None]}
        embedded = embedding(input_ids[None])
        for span, row in self.embedded:
            embedded[0, row : row + span.end - span.start] = table[span.slot][span.start : span.end]
        return {"inputs_embeds": embedded}

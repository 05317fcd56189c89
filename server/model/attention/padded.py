"""The work of plain torch attention in one step: sequences with one new token in padded groups, the others alone."""

from dataclasses import dataclass, field

import numpy as np
import torch

from server.model.batch import ForwardBatch, SequenceRows


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of similar length, attended to together."""

    rows: torch.Tensor  # [B] int64, rows of the step
    block_tables: torch.Tensor  # [B, blocks] int64, padded with the sequence's own last block
    context_lens: torch.Tensor  # [B] int64, keys per sequence, the new one included
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by sliding window; made on first use

    def mask(self, window: int | None, block_size: int) -> torch.Tensor:
        """Return `[B, 1, 1, blocks * block_size]` bool, True where a key may be attended to."""
        if window not in self.masks:
            positions = torch.arange(self.block_tables.shape[1] * block_size, device=self.rows.device)
            mask = positions < self.context_lens[:, None]
            if window is not None:
                mask &= positions >= self.context_lens[:, None] - window
            self.masks[window] = mask[:, None, None, :]
        return self.masks[window]


@dataclass(slots=True)
class PrefillChunk:
    """Rows `[start, end)` of the step are new tokens of one sequence; its context ends with them."""

    start: int
    end: int
    block_table: torch.Tensor  # [blocks] int64
    context_len: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return `[new tokens, context_len]` bool, True where a key may be attended to."""
        if window not in self.masks:
            queries = torch.arange(self.context_len - (self.end - self.start), self.context_len)[:, None]
            keys = torch.arange(self.context_len)[None, :]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self.masks[window] = mask.to(self.block_table.device)
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class PaddedPlan:
    """The attention work of one step."""

    decode_groups: list[DecodeGroup]
    prefill_chunks: list[PrefillChunk]


def plan_attention(batch: ForwardBatch) -> PaddedPlan:
    """Return the plan of a step, created in the first layer and reused by the others."""
    if batch.attention_plan is None:
        batch.attention_plan = PaddedPlan(_decode_groups(batch), _prefill_chunks(batch))
    found: PaddedPlan = batch.attention_plan
    return found


def _decode_groups(batch: ForwardBatch) -> list[DecodeGroup]:
    """Group sequences with one new token by context length within a factor of two: padding at most doubles the keys
    that are read."""
    by_size: dict[int, list[SequenceRows]] = {}
    for seq in batch.sequences:
        if seq.end - seq.start == 1:
            by_size.setdefault(seq.num_blocks(batch.block_size).bit_length(), []).append(seq)
    return [_decode_group(members, batch.block_size, batch.input_ids.device) for members in by_size.values()]


def _decode_group(members: list[SequenceRows], block_size: int, device: torch.device) -> DecodeGroup:
    num_blocks = max(seq.num_blocks(block_size) for seq in members)
    tables = np.zeros((len(members), num_blocks), dtype=np.int64)
    for index, seq in enumerate(members):
        used = seq.block_table[:num_blocks]
        tables[index, : len(used)] = used
        tables[index, len(used) :] = used[-1]  # not another's: masked keys still spread NaN
    return DecodeGroup(
        rows=torch.tensor([seq.start for seq in members], device=device),
        block_tables=torch.from_numpy(tables).to(device),
        context_lens=torch.tensor([seq.context_len for seq in members], device=device),
    )


def _prefill_chunks(batch: ForwardBatch) -> list[PrefillChunk]:
    device, size = batch.input_ids.device, batch.block_size
    return [
        PrefillChunk(
            seq.start,
            seq.end,
            torch.tensor(seq.block_table[: seq.num_blocks(size)], device=device),
            seq.context_len,
        )
        for seq in batch.sequences
        if seq.end - seq.start > 1
    ]

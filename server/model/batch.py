"""One step's tensors: built once from the schedule, read by every layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from adapters.segments import Rows, SlotUse
from server.sequence import ScheduledBatch, ScheduledSequence


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of similar length, attended to together."""

    rows: torch.Tensor  # [B] int64, rows of the step
    block_tables: torch.Tensor  # [B, blocks] int64, padded with the sequence's own last block
    context_lens: torch.Tensor  # [B] int64, keys per sequence, the new one included
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by sliding window; made on first use

    def mask(self, window: int | None, block_size: int) -> torch.Tensor:
        """`[B, 1, 1, blocks * block_size]` bool, True where a key may be attended to."""
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
        """`[new tokens, context_len]` bool, True where a key may be attended to."""
        if window not in self.masks:
            queries = torch.arange(self.context_len - (self.end - self.start), self.context_len)[:, None]
            keys = torch.arange(self.context_len)[None, :]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self.masks[window] = mask.to(self.block_table.device)
        return self.masks[window]


@dataclass(slots=True)
class ForwardBatch:
    """What the forward needs besides the weights. Rows are the flattened new tokens of all sequences, in batch order.

    `sample_rows` are the rows whose logits are wanted: the last token of each sequence that reaches its end.
    """

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    slot_mapping: torch.Tensor  # [rows] int64
    sample_rows: torch.Tensor  # [samples] int64
    decode_groups: list[DecodeGroup]
    prefill_chunks: list[PrefillChunk]


def build_batch(batch: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
    """Flatten a schedule. Every sequence's block table already covers its new tokens."""
    ids: list[int] = []
    positions, slots = [], []
    sample_rows: list[int] = []
    decodes: list[tuple[int, ScheduledSequence]] = []
    chunks: list[PrefillChunk] = []
    for scheduled in batch.sequences:
        row = len(ids)
        ids += scheduled.seq.token_ids[scheduled.start : scheduled.end]
        span = np.arange(scheduled.start, scheduled.end)
        positions.append(span)
        slots.append(np.asarray(scheduled.seq.block_table)[span // block_size] * block_size + span % block_size)
        if scheduled.samples:
            sample_rows.append(len(ids) - 1)
        if scheduled.num_new_tokens == 1:
            decodes.append((row, scheduled))
        else:
            table = torch.tensor(scheduled.seq.block_table[: -(-scheduled.end // block_size)], device=device)
            chunks.append(PrefillChunk(row, len(ids), table, scheduled.end))
    return ForwardBatch(
        input_ids=torch.tensor(ids, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        decode_groups=_decode_groups(decodes, block_size, device),
        prefill_chunks=chunks,
    )


def adapter_rows(sequences: Iterable[ScheduledSequence]) -> Iterator[Rows]:
    """Which adapters the step's rows take, in their order."""
    for scheduled in sequences:
        yield (), scheduled.num_inactive
        yield _uses(scheduled), scheduled.num_new_tokens - scheduled.num_inactive


def sampled_rows(sequences: Iterable[ScheduledSequence]) -> Iterator[Rows]:
    """The same for the rows that are sampled from, the last of their sequences."""
    for scheduled in sequences:
        if scheduled.samples:
            yield _uses(scheduled) if scheduled.end > scheduled.seq.active_from else (), 1


def _uses(scheduled: ScheduledSequence) -> tuple[SlotUse, ...]:
    seq = scheduled.seq
    if not seq.slots:  # the base, or an adapter that is merged into its weights
        return ()
    return tuple(SlotUse(slot, adapter.scale) for slot, adapter in zip(seq.slots, seq.adapters, strict=True))


def _decode_groups(
    decodes: list[tuple[int, ScheduledSequence]], block_size: int, device: torch.device
) -> list[DecodeGroup]:
    """Group by context length within a factor of two, so that padding at most doubles the keys that are read."""
    by_size: dict[int, list[tuple[int, ScheduledSequence]]] = {}
    for row, scheduled in decodes:
        by_size.setdefault((-(-scheduled.end // block_size)).bit_length(), []).append((row, scheduled))
    groups = []
    for members in by_size.values():
        num_blocks = max(-(-scheduled.end // block_size) for _, scheduled in members)
        tables = np.zeros((len(members), num_blocks), dtype=np.int64)
        for index, (_, scheduled) in enumerate(members):
            used = scheduled.seq.block_table[:num_blocks]
            tables[index, : len(used)] = used
            tables[index, len(used) :] = used[-1]  # not another's: masked keys still spread NaN
        groups.append(
            DecodeGroup(
                rows=torch.tensor([row for row, _ in members], device=device),
                block_tables=torch.from_numpy(tables).to(device),
                context_lens=torch.tensor([scheduled.end for _, scheduled in members], device=device),
            )
        )
    return groups

"""One step's tensors: built once from the schedule, read by every layer."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapters.device.transfers import upload
from adapters.kernels.segments import NO_SEGMENTS, Segments, build_segments
from server.model.adapter_rows import adapter_rows, head_rows
from server.model.pooled_tokens import pooled_tokens
from server.model.virtual_tokens import VirtualRows
from server.model.visible_context import visible_context
from server.sequence import ScheduledBatch
from server.sequence import Sequence as TokenSequence


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Rows `[start, end)` of the step are the new tokens of one sequence; its context ends with them, and begins later
    than the sequence if none of the rows sees the sequence's first blocks."""

    start: int
    end: int
    context_len: int
    block_table: list[int]  # at least the blocks of the context

    def num_blocks(self, block_size: int) -> int:
        return -(-self.context_len // block_size)


@dataclass
class ForwardBatch:
    """Everything that a forward pass needs besides the weights. Rows are the flattened new tokens of all sequences, in
    batch order.

    `sample_rows` are the rows whose logits are wanted, in order: the last token of each sequence that reaches its end,
    and tokens before those of prompts whose log-probabilities are wanted. `token_segments` are the adapter segments
    over all rows, `head_segments` those over the sample rows alone.
    `pooled_rows` are the ranges of rows whose final hidden states are pooled; the forward pass leaves their sums in
    `pooled` `[ranges, hidden]` float32.
    `attention_plan` is what the attention's implementation derives from `sequences` in the first layer and reads in the
    others.
    """

    input_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    slot_mapping: torch.Tensor  # [rows] int64; -1: the row's key and value are not kept
    sample_rows: torch.Tensor  # [samples] int64
    sequences: list[SequenceRows]
    block_size: int
    attention_plan: Any = None
    token_segments: Segments = NO_SEGMENTS
    head_segments: Segments = NO_SEGMENTS
    virtual: VirtualRows = field(default_factory=VirtualRows)
    pooled_rows: list[tuple[int, int]] = field(default_factory=list)
    pooled: torch.Tensor | None = None


LateTokens = tuple[dict[TokenSequence, int], torch.Tensor]  # sequences by the place of their last token on the device
Columns = dict[int, list[tuple[int, int]]]  # the rank columns of device slots


def build_batch(
    batch: ScheduledBatch,
    block_size: int,
    device: torch.device,
    columns: Columns | None = None,
    late_tokens: LateTokens | None = None,
) -> ForwardBatch:
    """Flatten a schedule. Every sequence's block table already covers its new tokens.

    `columns` has the slots of the batch's adapters; without it, all rows are the base model's. The last tokens of the
    sequences in `late_tokens` stay on the device (-1 there stands for any token: the sequence is about to end).
    """
    ids: list[int] = []
    positions, slots = [], []
    sample_rows: list[int] = []
    sequences: list[SequenceRows] = []
    pooled: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []  # rows, and the places of their tokens
    for scheduled in batch.sequences:
        row, table = len(ids), scheduled.seq.block_table
        ids += scheduled.seq.token_ids[scheduled.start : scheduled.end]
        span = np.arange(scheduled.start, scheduled.end)
        positions.append(span)
        slots.append(np.asarray(table)[span // block_size] * block_size + span % block_size)
        if tokens := pooled_tokens(scheduled):
            pooled.append((row + tokens.start - scheduled.start, row + tokens.stop - scheduled.start))
        first_scored = row + scheduled.scored_from - scheduled.start
        sample_rows += range(first_scored, first_scored + scheduled.num_scored)
        if scheduled.samples:
            sample_rows.append(len(ids) - 1)
            if late_tokens and scheduled.seq in late_tokens[0]:
                late.append((len(ids) - 1, late_tokens[0][scheduled.seq]))
        sequences.append(SequenceRows(row, len(ids), *visible_context(table, scheduled.end, block_size)))
    packed = np.concatenate([ids, *positions, *slots, sample_rows, *zip(*late, strict=True)]).astype(np.int64)
    sizes = [len(ids), len(ids), len(ids), len(sample_rows), len(late), len(late)]
    input_ids, row_positions, slot_mapping, samples, rows, places = torch.split(upload(packed, device), sizes)
    if late_tokens and late:
        input_ids.index_copy_(0, rows, late_tokens[1].index_select(0, places).clamp_min(0))
    forward = ForwardBatch(input_ids, row_positions, slot_mapping, samples, sequences, block_size)
    forward.pooled_rows = pooled
    forward.virtual = VirtualRows.of(batch.sequences, block_size, device)
    if columns is not None:
        forward.token_segments = build_segments(adapter_rows(batch.sequences), columns)
        forward.head_segments = build_segments(head_rows(batch.sequences), columns)
    return forward

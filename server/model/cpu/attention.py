"""Paged attention on a CPU, which reads keys and values in place; prefill and decode in one call."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.model.batch import ForwardBatch, SequenceRows
from server.model.cpu.library import function
from server.model.kv_cache import KVCache

_ROWS = 8  # of a prefill per work item; small enough to give all threads work


@dataclass(slots=True)
class NativeAttentionPlan:
    """The attention work of one step. `work` `[items, 4]` int64: (first row, rows, keys that the first row sees, start
    of the sequence's block table in `tables`). `step` is what decoder_layer.py keeps for the layers after the
    first."""

    work: torch.Tensor
    tables: torch.Tensor
    step: Any = None


def plan_attention(batch: ForwardBatch) -> NativeAttentionPlan:
    """Return the plan of a step, created in the first layer and reused by the others."""
    if batch.attention_plan is None:
        items: list[tuple[int, int, int, int]] = []
        tables: list[int] = []
        for seq in batch.sequences:
            items += [(row, rows, seen, len(tables)) for row, rows, seen in _pieces(seq)]
            tables += seq.block_table[: seq.num_blocks(batch.block_size)]
        batch.attention_plan = NativeAttentionPlan(
            torch.from_numpy(np.array(items, dtype=np.int64).reshape(-1, 4)),
            torch.from_numpy(np.array(tables, dtype=np.int64)),
        )
    found: NativeAttentionPlan = batch.attention_plan
    return found


def _pieces(seq: SequenceRows) -> list[tuple[int, int, int]]:
    return [
        (row, min(_ROWS, seq.end - row), seq.context_len - (seq.end - row) + 1)
        for row in range(seq.start, seq.end, _ROWS)
    ]


def paged_attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: ForwardBatch,
    cache: KVCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Implement `server.model.attention.paged.paged_attention`."""
    cache.write(layer, key.transpose(0, 1), value.transpose(0, 1), batch.slot_mapping)
    query = query.transpose(0, 1)
    if query.stride(2) != 1:
        query = query.contiguous()
    keys, values, own = cache.keys[layer], cache.values[layer], plan_attention(batch)
    rows, heads, head_dim = query.shape
    out = torch.empty(rows, heads, head_dim, dtype=query.dtype)
    function("attention", query.dtype)(
        out.data_ptr(), query.data_ptr(), query.stride(0), query.stride(1), keys.data_ptr(), values.data_ptr(),
        own.work.data_ptr(), len(own.work), own.tables.data_ptr(), heads, keys.shape[2], head_dim, cache.block_size,
        window or 0, scale, softcap or 0.0, torch.get_num_threads(),
    )  # fmt: skip
    return out

"""A step's attention work as tiles for the Triton kernels: one int32 tensor that captured graphs can read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from adapters.device.transfers import upload
from server.model.batch import SequenceRows

FIELDS = 4  # per tile: first row, number of tokens, position of the first token, start of its block table
TILE_TOKENS = 16  # of a prefill tile; a program takes all query heads that share a key head, so rows are a multiple

Tile = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """The tiles of one step. `metadata` contains `num_decodes` tiles of one token, `num_prefills` tiles of up to
    `TILE_TOKENS` tokens, and the concatenated block tables."""

    metadata: torch.Tensor
    num_decodes: int
    num_prefills: int

    @property
    def decode_tiles(self) -> torch.Tensor:
        return self.metadata[: self.num_decodes * FIELDS]

    @property
    def prefill_tiles(self) -> torch.Tensor:
        return self.metadata[self.num_decodes * FIELDS :][: self.num_prefills * FIELDS]

    @property
    def tables(self) -> torch.Tensor:
        return self.metadata[(self.num_decodes + self.num_prefills) * FIELDS :]


def build_layout(sequences: Sequence[SequenceRows], block_size: int, device: torch.device) -> AttentionLayout:
    decodes, prefills, tables = _tiles(sequences, block_size)
    return AttentionLayout(upload(_packed(decodes + prefills, tables), device), len(decodes), len(prefills))


def static_layout(rows: int, num_blocks: int, device: torch.device) -> AttentionLayout:
    """Return an empty layout for decode steps of up to `rows` rows and `num_blocks` blocks in all block tables."""
    return AttentionLayout(upload(_packed(_padding(0, rows), [0] * num_blocks), device), rows, 0)


def refill(layout: AttentionLayout, sequences: Sequence[SequenceRows], block_size: int) -> bool:
    """Overwrite `layout`, made by `static_layout`, with a step. Returns False without a change if it does not fit."""
    decodes, prefills, tables = _tiles(sequences, block_size)
    if prefills or len(decodes) > layout.num_decodes or len(tables) > len(layout.tables):
        return False
    packed = _packed(decodes + _padding(len(decodes), layout.num_decodes), tables)
    layout.metadata[: len(packed)].copy_(upload(packed, layout.metadata.device))
    return True


def _tiles(sequences: Sequence[SequenceRows], block_size: int) -> tuple[list[Tile], list[Tile], list[int]]:
    decodes: list[Tile] = []
    prefills: list[Tile] = []
    tables: list[int] = []
    for seq in sequences:
        table = len(tables)
        tables += seq.block_table[: seq.num_blocks(block_size)]
        if seq.end - seq.start == 1:
            decodes.append((seq.start, 1, seq.context_len - 1, table))
            continue
        for row in range(seq.start, seq.end, TILE_TOKENS):
            prefills.append((row, min(TILE_TOKENS, seq.end - row), seq.context_len - (seq.end - row), table))
    return decodes, prefills, tables


def _padding(start: int, end: int) -> list[Tile]:
    """Return tiles for rows beyond the step. Their results are unused, but later layers read them."""
    return [(row, 1, 0, 0) for row in range(start, end)]


def _packed(tiles: list[Tile], tables: list[int]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.array(tiles, dtype=np.int32).ravel(), np.array(tables, dtype=np.int32)])

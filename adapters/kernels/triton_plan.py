"""What a step's segments are to the Triton kernels: tiles of rows, and per tile the blocks of rank columns that they
take. No torch.

Rows that several segments cover (an adapter on pages that are not adjacent, several adapters in one request) are one
tile with several blocks. A tile is written by one program only, which adds its blocks up in the order of their columns:
no atomics, no second pass, and the same bits whoever else is in the batch. Base rows are in no tile.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from adapters.kernels.segments import Segment

BLOCK_COLUMNS = 16  # rank columns of a block: the least that tensor cores multiply, and a page of the pool

Metadata = npt.NDArray[np.int32]


def build(segments: Sequence[Segment], tile_rows: int) -> tuple[Metadata, Metadata]:
    """Tiles `[tiles, 4]` of (first row, rows, first block, blocks) and blocks `[blocks, 5]` of (first row, rows, first
    column, columns, bits of the float32 scale)."""
    tiles: list[tuple[int, int, int, int]] = []
    blocks: list[tuple[int, int, int, int, float]] = []
    for start, end, covering in _spans(segments):
        columns = [block for segment in covering for block in _column_blocks(segment)]
        for row in range(start, end, tile_rows):
            rows = min(tile_rows, end - row)
            tiles.append((row, rows, len(blocks), len(columns)))
            blocks += [(row, rows, *block) for block in columns]
    packed = np.array([block[:4] for block in blocks], dtype=np.int32).reshape(-1, 4)
    scales = np.array([block[4] for block in blocks], dtype=np.float32).view(np.int32)
    return np.array(tiles, dtype=np.int32).reshape(-1, 4), np.column_stack([packed, scales])


def rows_of(tiles: Metadata, num_rows: int) -> Metadata:
    """The same by row, `[num_rows, 3]`: its place in its tile, first block, blocks. Base rows have no blocks."""
    rows = np.zeros((num_rows, 3), dtype=np.int32)
    for first_row, count, first_block, blocks in tiles.reshape(-1, 4):
        own = rows[first_row : first_row + count]
        own[:, 0], own[:, 1:] = np.arange(count), (first_block, blocks)
    return rows


def _spans(segments: Sequence[Segment]) -> Iterator[tuple[int, int, list[Segment]]]:
    """The batch's rows cut where a segment starts or ends, with the segments over each piece by column."""
    starting: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        starting[segment.start].append(segment)
    active: list[Segment] = []
    for start, end in pairwise(sorted({cut for segment in segments for cut in (segment.start, segment.end)})):
        active = [segment for segment in active if segment.end > start] + starting[start]
        if active:
            yield start, end, sorted(active, key=lambda segment: segment.lo)


def _column_blocks(segment: Segment) -> list[tuple[int, int, float]]:
    return [
        (column, min(BLOCK_COLUMNS, segment.hi - column), segment.scale)
        for column in range(segment.lo, segment.hi, BLOCK_COLUMNS)
    ]

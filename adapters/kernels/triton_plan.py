"""A step's segments in the form that the Triton kernels read: tiles of rows, and per tile its blocks of rank columns.
No torch.

Rows covered by several segments (an adapter on non-adjacent pages, several adapters in one request) form one tile with
several blocks. Only one program writes a tile, and it adds up the blocks in column order: no atomics, no second pass,
and bit-identical results whatever else is in the batch. Base rows are in no tile.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from adapters.kernels.segments import Segment

BLOCK_COLUMNS = 16  # rank columns of a block: the minimum for tensor cores, and the size of a page of the pool

Metadata = npt.NDArray[np.int32]


def build_tiles(segments: Sequence[Segment], tile_rows: int) -> tuple[Metadata, Metadata]:
    """Return int32 tiles `[tiles, 4]` of (first row, rows, first block, blocks) and int32 blocks `[blocks, 5]` of
    (first row, rows, first column, columns, bits of the float32 scale)."""
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
    """Return the tiles by row, int32 `[num_rows, 3]`: position in the tile, first block, blocks. Base rows have no
    blocks."""
    rows = np.zeros((num_rows, 3), dtype=np.int32)
    for first_row, count, first_block, blocks in tiles.reshape(-1, 4):
        own = rows[first_row : first_row + count]
        own[:, 0], own[:, 1:] = np.arange(count), (first_block, blocks)
    return rows


def _spans(segments: Sequence[Segment]) -> Iterator[tuple[int, int, list[Segment]]]:
    """Yield ranges of the batch's rows, split where a segment starts or ends, with the segments over each range in
    column order."""
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

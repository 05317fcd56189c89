"""The LoRA product in two Triton kernels, for CUDA.

    shrink   one program per (block, part of in_features, linear): v = x[rows of the block] @ A[columns of the block].T
    expand   one program per (tile, part of out_features, linear): y += sum over the tile's blocks of scale * v @ B

Sums are float32 throughout; each part of in_features has its own plane of v, and expand adds the planes up in order, so
nothing is atomic and nothing is zeroed first. The parts depend on in_features alone, hence a row's result does not
depend on its batch. Pages that no segment names are never read. The grids have the capacity of the plan: programs
beyond the step's tiles have no rows and return immediately, so a captured graph serves any step that fits its plan.

Tile sizes are chosen by arithmetic and are not yet measured on a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from adapters.device.transfers import upload
from adapters.kernels.segments import Segment, Segments
from adapters.kernels.triton_plan import BLOCK_COLUMNS, Metadata, build_tiles, rows_of
from adapters.model_spec import MAX_SIBLINGS

TILE_FIELDS, BLOCK_FIELDS = 4, 5
DECODE_ROWS, PREFILL_ROWS = 16, 64  # rows of a tile; 16 is the minimum for tensor cores
BLOCK_IN, BLOCK_OUT = 128, 128
PART_IN, MAX_PARTS = 512, 16  # in_features of one shrink program at decode, and the maximum number of parts
GRAPH_BLOCKS_PER_ROW = 2  # capacity of a captured plan: rank 32 for every row, more where rows share adapters


@triton.jit(do_not_specialize=["num_blocks"])  # it differs from step to step: no new compilation
def _shrink(
    x, a, blocks, v, x_stride, num_blocks, slice_stride,
    K: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, part, linear = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    meta = blocks + block * 5
    num_rows = tl.load(meta + 1)
    if num_rows == 0:
        return
    tile_row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    own_row, own_column = tile_row < num_rows, column < tl.load(meta + 3)
    x_rows = x + (tl.load(meta) + tile_row).to(tl.int64)[:, None] * x_stride
    a_rows = a + linear.to(tl.int64) * slice_stride + (tl.load(meta + 2) + column).to(tl.int64)[None, :] * K
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, PART, BLOCK_K):
        k = part * PART + start + tl.arange(0, BLOCK_K)
        xs = tl.load(x_rows + k[None, :], mask=own_row[:, None] & (k < K)[None, :], other=0.0)
        columns = tl.load(a_rows + k[:, None], mask=own_column[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(xs, columns, acc, input_precision="ieee")
    plane = v + ((linear * tl.num_programs(1) + part) * num_blocks + block).to(tl.int64) * (ROWS * COLUMNS)
    tl.store(plane + tile_row[:, None] * COLUMNS + column[None, :], acc)


@triton.jit(do_not_specialize=["num_blocks"])  # it differs from step to step: no new compilation
def _expand(
    y, b, tiles, blocks, v, y_stride, num_blocks, num_columns, N0, N1, N2,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    linear = tl.program_id(2)
    before = tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1))
    N = tl.where(linear == 0, N0, tl.where(linear == 1, N1, N2))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    meta = tiles + tl.program_id(0) * 4
    num_rows = tl.where(tl.program_id(1) * BLOCK_N < N, tl.load(meta + 1), 0)
    if num_rows == 0:
        return
    tile_row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (tile_row < num_rows)[:, None] & (n < N)[None, :]
    y_tile = y + (tl.load(meta) + tile_row).to(tl.int64)[:, None] * y_stride + (before + n)[None, :]
    b_own = b + before.to(tl.int64) * num_columns
    acc = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(meta + 2)
    for block in range(first, first + tl.load(meta + 3)):
        own = blocks + block * 5
        vs = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            plane = v + ((linear * PARTS + part) * num_blocks + block).to(tl.int64) * (ROWS * COLUMNS)
            vs += tl.load(plane + tile_row[:, None] * COLUMNS + column[None, :])
        vs *= tl.load(own + 4).to(tl.float32, bitcast=True)
        b_rows = b_own + (tl.load(own + 2) + column).to(tl.int64)[:, None] * N
        outputs = tl.load(b_rows + n[None, :], mask=(column < tl.load(own + 3))[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(vs.to(b.dtype.element_ty), outputs, acc, input_precision="ieee")
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(slots=True)
class TritonPlan:
    """`metadata` holds `num_tiles` tiles, then `num_blocks` blocks, then `num_rows` rows (see triton_plan.py), int32
    on the device; unused entries are zero. `tile_rows` is the height of a tile, `items` are the planned segments."""

    metadata: torch.Tensor
    num_tiles: int
    num_blocks: int
    num_rows: int
    tile_rows: int
    items: tuple[Segment, ...]

    @property
    def tiles(self) -> torch.Tensor:
        return self.metadata[: self.num_tiles * TILE_FIELDS]

    @property
    def blocks(self) -> torch.Tensor:
        return self.metadata[self.num_tiles * TILE_FIELDS :]

    @property
    def rows(self) -> torch.Tensor:
        return self.blocks[self.num_blocks * BLOCK_FIELDS :]


@dataclass(frozen=True, slots=True)
class Delta:
    """The adapters' delta for linears over one input, as computed by `shrink`: `v` `[linears, parts, blocks, tile
    rows, block columns]` in float32, and the B to multiply it with."""

    v: torch.Tensor
    b: torch.Tensor
    columns: int  # rank columns of b, for each linear
    sizes: tuple[int, ...]
    plan: TritonPlan

    @property
    def parts(self) -> int:
        return self.v.shape[1]


class TritonKernel:
    """Triton kernels, with a cache of the last plans."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # While the same sequences decode, and for the head of a decode step, the segments equal those planned last.
        self._recent = lru_cache(maxsize=4)(self._plan)

    def plan_segments(self, segments: Segments) -> TritonPlan:
        return self._recent(segments.items)

    def _plan(self, items: tuple[Segment, ...]) -> TritonPlan:
        rows = {(segment.start, segment.end) for segment in items}
        is_decode = sum(end - start for start, end in rows) <= DECODE_ROWS * len(rows)
        tile_rows = DECODE_ROWS if is_decode else PREFILL_ROWS
        tiles, blocks = build_tiles(items, tile_rows)
        num_rows = max((end for _, end in rows), default=0)
        metadata = upload(_packed(tiles, blocks, len(tiles), len(blocks), num_rows), self._device)
        return TritonPlan(metadata, len(tiles), len(blocks), num_rows, tile_rows, items)

    def static_plan(self, rows: int) -> TritonPlan:
        """Return an empty plan with the capacity of a decode step of `rows` rows; a captured graph keeps reading it."""
        num_blocks = max(rows * GRAPH_BLOCKS_PER_ROW, BLOCK_COLUMNS)
        none = np.zeros((0, 0), dtype=np.int32)
        metadata = upload(_packed(none, none, rows, num_blocks, rows), self._device)
        return TritonPlan(metadata, rows, num_blocks, rows, DECODE_ROWS, ())

    def refill(self, plan: TritonPlan, segments: Segments) -> bool:
        """Overwrite `plan`, which `static_plan` returned, to describe `segments`. Returns False, without a change,
        if they do not fit."""
        if segments.items == plan.items:  # the same sequences continue to decode
            return True
        tiles, blocks = build_tiles(segments.items, plan.tile_rows)
        if len(tiles) > plan.num_tiles or len(blocks) > plan.num_blocks:
            return False
        packed = _packed(tiles, blocks, plan.num_tiles, plan.num_blocks, plan.num_rows)
        plan.metadata.copy_(upload(packed, self._device))
        plan.items = segments.items
        return True

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        sizes: tuple[int, ...],
        plan: TritonPlan,
    ) -> None:
        self.expand(y, self.shrink(x, a, b, sizes, plan))

    def shrink(
        self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, ...], plan: TritonPlan
    ) -> Delta:
        """Compute the first half of `add_lora`, which does not need the linears' output."""
        linears, columns, in_features = a.shape
        assert len(sizes) == linears <= MAX_SIBLINGS, (sizes, a.shape)
        part, parts = _parts(in_features)
        v = torch.empty(
            (linears, parts, plan.num_blocks, plan.tile_rows, BLOCK_COLUMNS), dtype=torch.float32, device=x.device
        )
        _shrink[(plan.num_blocks, parts, linears)](
            x, a, plan.blocks, v, x.stride(0), plan.num_blocks, a.stride(0),
            K=in_features, PART=part, BLOCK_K=BLOCK_IN, ROWS=plan.tile_rows, COLUMNS=BLOCK_COLUMNS,
        )  # fmt: skip
        return Delta(v, b, columns, sizes, plan)

    def expand(self, y: torch.Tensor, delta: Delta) -> None:
        """Compute the second half of `add_lora`: add the delta to `y` in place."""
        plan, sizes = delta.plan, delta.sizes
        absent = (0,) * (MAX_SIBLINGS - len(sizes))
        _expand[(plan.num_tiles, triton.cdiv(max(sizes), BLOCK_OUT), len(sizes))](
            y, delta.b, plan.tiles, plan.blocks, delta.v, y.stride(0), plan.num_blocks, delta.columns, *sizes, *absent,
            PARTS=delta.parts, BLOCK_N=BLOCK_OUT, ROWS=plan.tile_rows, COLUMNS=BLOCK_COLUMNS,
        )  # fmt: skip


def _parts(in_features: int) -> tuple[int, int]:
    """Return the in_features of one shrink program, and the number of programs."""
    parts = min(triton.cdiv(in_features, PART_IN), MAX_PARTS)
    part = triton.cdiv(triton.cdiv(in_features, parts), BLOCK_IN) * BLOCK_IN
    return part, triton.cdiv(in_features, part)


def _packed(tiles: Metadata, blocks: Metadata, num_tiles: int, num_blocks: int, num_rows: int) -> Metadata:
    tables = ((tiles, num_tiles * TILE_FIELDS), (blocks, num_blocks * BLOCK_FIELDS), (rows_of(tiles, num_rows), 0))
    padded = [np.pad(table.ravel(), (0, max(size - table.size, 0))) for table, size in tables]
    return np.concatenate(padded)

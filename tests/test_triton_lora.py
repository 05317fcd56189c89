"""The Triton LoRA kernels agree with float64 for any ranks, popularity, sizes and dtype; nothing leaks, and a row's
result does not depend on its batch. The tests run in Triton's interpreter, or with `make test-gpu` on a GPU."""

import pytest
import torch

from adapters.kernels import triton_plan
from adapters.kernels.segments import Segment, Segments, SlotUse, build_segments
from tests.fixtures.triton_device import DEVICE, DTYPES, EPSILON, require_triton
from tests.test_kernels import POPULARITIES, SIZES, Pool, Uses, exact, make_pool, uses_of_rows

require_triton()

from adapters.kernels.triton_lora import DECODE_ROWS, PREFILL_ROWS, TritonKernel, TritonPlan

KERNEL = TritonKernel(DEVICE)


def inputs(rows: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, features, generator=generator).to(dtype) for features in sizes)
    return x, y


def added(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: Segments,
    plan: TritonPlan | None = None,
) -> torch.Tensor:
    out = y.clone().to(DEVICE)
    KERNEL.add_lora(
        out,
        x.to(DEVICE),
        a[None].to(DEVICE),
        b.flatten().to(DEVICE),
        (b.shape[1],),
        plan or KERNEL.plan_segments(segments),
    )
    return out.cpu()


def segments_of(rows: list[Uses], pool: Pool) -> Segments:
    return build_segments(((uses, 1) for uses in rows), pool.runs)


def of(*slots: int) -> list[Uses]:
    """List the adapters of rows with one adapter each; -1 is the base."""
    return [(SlotUse(slot),) if slot >= 0 else () for slot in slots]


def without_foreign_columns(pool: Pool, segments: Segments) -> Pool:
    """Return the pool with NaN in the columns that no segment of the step names."""
    named = {column for segment in segments.items for column in range(segment.lo, segment.hi)}
    foreign = [column for column in range(len(pool.a)) if column not in named]
    a, b = pool.a.clone(), pool.b.clone()
    a[foreign], b[foreign] = torch.nan, torch.nan
    return Pool(a, b, pool.runs, pool.columns)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_right_base_rows_keep_their_bits_and_unused_pages_are_not_read(
    dtype: torch.dtype, rows: int
) -> None:
    for index, popularity in enumerate(POPULARITIES):
        sizes, seed = SIZES[(index + rows) % len(SIZES)], index + rows
        pool, uses = make_pool(seed, *sizes, dtype), uses_of_rows(popularity, rows, seed)
        x, y = inputs(rows, sizes, dtype, seed)
        segments = segments_of(uses, pool)
        if not segments:
            continue
        spoiled = without_foreign_columns(pool, segments)
        got = added(y, x, spoiled.a, spoiled.b, segments)
        torch.testing.assert_close(got.double(), exact(y, x, pool, uses), atol=EPSILON[dtype], rtol=EPSILON[dtype])
        base = [row for row, own in enumerate(uses) if not own]
        assert torch.equal(got[base].view(torch.uint8), y[base].view(torch.uint8))


@pytest.mark.parametrize("sizes", [(4104, 200), (200, 4104), (14336, 48), (16, 16)], ids=str)
def test_sizes_that_no_tile_divides(sizes: tuple[int, int]) -> None:
    pool, uses = make_pool(0, *sizes, torch.bfloat16), of(0, 3, 3, 6)
    x, y = inputs(4, sizes, torch.bfloat16, 0)
    got = added(y, x, pool.a, pool.b, segments_of(uses, pool))
    torch.testing.assert_close(got.double(), exact(y, x, pool, uses), atol=3e-2, rtol=3e-2)


def test_rank_256_beside_rank_1_and_columns_that_are_no_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(280, 64, generator=generator) / 8, torch.randn(280, 80, generator=generator) / 16
    x, y = inputs(5, (64, 80), torch.float32, 0)
    segments = Segments((Segment(0, 2, 0, 256), Segment(2, 5, 259, 278)))
    want = y.double()
    for s in segments.items:
        want[s.start : s.end] += x[s.start : s.end].double() @ a[s.lo : s.hi].double().T @ b[s.lo : s.hi].double()
    torch.testing.assert_close(added(y, x, a, b, segments).double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_adapters_on_one_row_add_up_each_with_its_scale(dtype: torch.dtype) -> None:
    """Segments overlap in every way; the sum is rounded once."""
    pool = make_pool(3, 200, 150, dtype)
    x, y = inputs(70, (200, 150), dtype, 3)
    items = (
        Segment(0, 66, 0, 16, 0.5),
        Segment(4, 9, 16, 64, -2.0),
        Segment(4, 70, 64, 80),
        Segment(8, 12, 96, 112, 0.0),
    )
    want = y.double()
    for s in items:
        v = x[s.start : s.end].double() @ pool.a[s.lo : s.hi].double().T
        want[s.start : s.end] += s.scale * v @ pool.b[s.lo : s.hi].double()
    got = added(y, x, pool.a, pool.b, Segments(items))
    torch.testing.assert_close(got.double(), want, atol=3 * EPSILON[dtype], rtol=EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_bits_do_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    pool, uses = make_pool(1, 576, 200, dtype), uses_of_rows("some composed", 24, 1)
    x, y = inputs(24, (576, 200), dtype, 1)
    together = added(y, x, pool.a, pool.b, segments_of(uses, pool))
    for row in range(24):
        own = segments_of([uses[row]], pool)
        alone = added(y[row : row + 1], x[row : row + 1], pool.a, pool.b, own) if own else y[row : row + 1]
        assert torch.equal(alone[0], together[row]), row
    again = added(y, x, pool.a, pool.b, segments_of(uses, pool))
    assert torch.equal(again, together)


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_row_and_an_overflowing_adapter_spoil_nobody_else(bad: float) -> None:
    pool, uses = make_pool(0, 64, 200, torch.float32), of(-1, 1, 1, 3, 3, 6)
    x, y = inputs(6, (64, 200), torch.float32, 0)
    before = exact(y, x, pool, uses)
    pool.a[pool.columns[1]] = 3e38
    x[3] = bad
    got = added(y, x, pool.a, pool.b, segments_of(uses, pool))
    torch.testing.assert_close(got[[4, 5]].double(), before[[4, 5]], atol=2e-5, rtol=2e-5)
    assert torch.equal(got[0], y[0]) and not torch.isfinite(got[[1, 2, 3]]).all(-1).any()


def test_rows_of_a_wider_tensor() -> None:
    pool, uses = make_pool(0, 64, 200, torch.float32), of(2, 2, 5)
    x, y = inputs(3, (64, 200), torch.float32, 0)
    wide_x, wide_y = torch.full((3, 100), torch.nan, device=DEVICE), torch.full((3, 300), 7.0, device=DEVICE)
    wide_x[:, :64], wide_y[:, :200] = x.to(DEVICE), y.to(DEVICE)
    plan = KERNEL.plan_segments(segments_of(uses, pool))
    a, b = pool.a[None].to(DEVICE), pool.b.flatten().to(DEVICE)
    KERNEL.add_lora(wide_y[:, :200], wide_x[:, :64], a, b, (200,), plan)
    torch.testing.assert_close(wide_y[:, :200].cpu().double(), exact(y, x, pool, uses), atol=2e-5, rtol=2e-5)
    assert (wide_y[:, 200:] == 7).all()


@pytest.mark.parametrize("sizes", [(200, 64, 64), (130, 300), (40,)], ids=str)
def test_sibling_linears_share_their_launches(sizes: tuple[int, ...]) -> None:
    """Each linear gets the bits that a call of its own computes."""
    uses = uses_of_rows("some base", 30, 5)
    pools = [make_pool(7, 576, size, torch.bfloat16) for size in sizes]  # one layout of pages
    x, y = inputs(30, (576, sum(sizes)), torch.bfloat16, 5)
    segments = segments_of(uses, pools[0])
    parts = [added(part, x, pool.a, pool.b, segments) for part, pool in zip(y.split(sizes, 1), pools, strict=True)]
    stacked_a = torch.stack([pool.a for pool in pools]).to(DEVICE)
    stacked_b = torch.cat([pool.b.flatten() for pool in pools]).to(DEVICE)
    got = y.clone().to(DEVICE)
    KERNEL.add_lora(got, x.to(DEVICE), stacked_a, stacked_b, sizes, KERNEL.plan_segments(segments))
    assert torch.equal(got.cpu(), torch.cat(parts, 1))


def test_a_static_plan_serves_one_step_after_another() -> None:
    """A captured graph repeats the same launches, with the metadata replaced in place."""
    pool = make_pool(2, 64, 200, torch.float32)
    x, y = inputs(8, (64, 200), torch.float32, 2)
    plan = KERNEL.static_plan(8)
    for uses in (of(*[0] * 8), of(-1, -1, 0, 1, 2, 3, 4, 5), of(*[-1] * 7, 6), of(*[-1] * 8), of(*[3] * 8)):
        segments = segments_of(uses, pool)
        spoiled = without_foreign_columns(pool, segments)
        assert KERNEL.refill(plan, segments)
        got = added(y, x, spoiled.a, spoiled.b, segments, plan)
        torch.testing.assert_close(got.double(), exact(y, x, pool, uses), atol=2e-5, rtol=2e-5)
        base = [row for row, own in enumerate(uses) if not own]
        assert torch.equal(got[base], y[base])


def test_a_step_beyond_a_static_plan_is_refused_and_leaves_it_as_it_was() -> None:
    plan = KERNEL.static_plan(2)
    assert KERNEL.refill(plan, Segments((Segment(0, 2, 0, 32),)))
    before = plan.metadata.clone()
    assert not KERNEL.refill(plan, Segments((Segment(0, 1, 0, 16), Segment(1, 2, 0, 16), Segment(2, 3, 0, 16))))
    assert not KERNEL.refill(plan, Segments((Segment(0, 1, 0, 16 * 17),)))
    assert torch.equal(plan.metadata, before)


def test_the_same_segments_are_planned_and_copied_once() -> None:
    kernel = TritonKernel(DEVICE)
    first = kernel.plan_segments(Segments((Segment(0, 1, 0, 16), Segment(1, 2, 32, 48))))
    assert kernel.plan_segments(Segments((Segment(0, 1, 0, 16), Segment(1, 2, 32, 48)))) is first
    assert kernel.plan_segments(Segments((Segment(0, 1, 0, 16),))) is not first


def test_decode_steps_take_low_tiles_and_prefill_steps_high_ones() -> None:
    decode = KERNEL.plan_segments(Segments(tuple(Segment(row, row + 1, 0, 16) for row in range(40))))
    assert (decode.tile_rows, decode.num_tiles) == (DECODE_ROWS, 40)
    prefill = KERNEL.plan_segments(Segments((Segment(0, 130, 0, 32), Segment(130, 131, 32, 48))))
    assert (prefill.tile_rows, prefill.num_tiles, prefill.num_blocks) == (PREFILL_ROWS, 4, 7)


def test_rows_are_cut_where_the_set_of_segments_changes() -> None:
    tiles, blocks = triton_plan.build_tiles([Segment(2, 6, 0, 16), Segment(4, 8, 32, 56), Segment(10, 11, 0, 16)], 16)
    assert tiles.tolist() == [[2, 2, 0, 1], [4, 2, 1, 3], [6, 2, 4, 2], [10, 1, 6, 1]]
    assert blocks[:, :4].tolist() == [
        [2, 2, 0, 16], [4, 2, 0, 16], [4, 2, 32, 16], [4, 2, 48, 8], [6, 2, 32, 16], [6, 2, 48, 8], [10, 1, 0, 16],
    ]  # fmt: skip

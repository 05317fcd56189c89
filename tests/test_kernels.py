"""Every LoRA kernel against a float64 computation from the stored values: any mix of ranks, any popularity of adapters,
odd sizes, scattered pages; and base rows are bit-identical."""

import ctypes
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.device import cpp_build as compiled
from adapters.device.forms import FORCED, FORMS
from adapters.kernels import choose_kernel
from adapters.kernels.contract import LoRAKernel
from adapters.kernels.cpu import SOURCE, NativeKernel
from adapters.kernels.grouped import DensePlan, GroupedKernel
from adapters.kernels.reference import ReferenceKernel
from adapters.kernels.segments import Segment, Segments, SlotUse, build_segments, column_runs
from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from tests.fixtures.native_forms import NAMES as NATIVE_FORMS
from tests.fixtures.native_forms import forget, form_named, skip_unless_it_runs

CPU = torch.device("cpu")
RANKS = (1, 4, 8, 16, 24, 40, 64)
Uses = tuple[SlotUse, ...]
SIZES = ((64, 200), (200, 576), (576, 64), (64, 64))


class DenseKernel(GroupedKernel):
    """Always the dense method, whatever its cost."""

    def plan_segments(self, segments: Segments) -> DensePlan | Segments:
        items = segments.items
        start, end = min(s.start for s in items), max(s.end for s in items)
        lo, hi = min(s.lo for s in items), max(s.hi for s in items)
        return self._dense(items, start, end, lo, hi)


class SegmentKernel(GroupedKernel):
    """Always two matmuls per segment, whatever their cost."""

    def plan_segments(self, segments: Segments) -> DensePlan | Segments:
        return segments


KERNELS: dict[str, Callable[[], LoRAKernel]] = {
    "reference": ReferenceKernel,
    "grouped": lambda: GroupedKernel(CPU),
    "dense": lambda: DenseKernel(CPU),
    "per segment": lambda: SegmentKernel(CPU),
    **{f"native {name}": lambda name=name: native_kernel(name) for name in NATIVE_FORMS},
    "chosen": lambda: choose_kernel(CPU, torch.float32)[0],
}


def native_kernel(form: str) -> LoRAKernel:
    skip_unless_it_runs(form)
    return NativeKernel(ctypes.CDLL(str(compiled.build(SOURCE, form_named(form)))))


@dataclass
class Pool:
    """Rank columns of one adapter per rank, on scattered pages; `columns[slot]` are its real columns."""

    a: torch.Tensor
    b: torch.Tensor
    runs: dict[int, list[tuple[int, int]]]
    columns: dict[int, list[int]]


def make_pool(seed: int, in_features: int, out_features: int, dtype: torch.dtype, scattered: bool = True) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-rank // PAGE_COLUMNS) for rank in RANKS]
    order = list(range(sum(num_pages) + 3))  # three pages belong to nobody
    if scattered:
        random.Random(seed).shuffle(order)
    # Pages of nobody keep what their last owner left.
    a = torch.randn(len(order) * PAGE_COLUMNS, in_features, generator=generator) / in_features**0.5
    b = torch.randn(len(order) * PAGE_COLUMNS, out_features, generator=generator)
    runs, columns = {}, {}
    for slot, (rank, count) in enumerate(zip(RANKS, num_pages, strict=True)):
        pages, order = sorted(order[:count]), order[count:]
        runs[slot] = column_runs(pages, PAGE_COLUMNS)
        own = [page * PAGE_COLUMNS + column for page in pages for column in range(PAGE_COLUMNS)]
        columns[slot], padding = own[:rank], own[rank:]
        a[padding], b[padding] = 0, 0
        b[columns[slot]] /= rank**0.5  # deltas are near 1 for every rank
    return Pool(a.to(dtype), b.to(dtype), runs, columns)


def uses_of_rows(popularity: str, num_rows: int, seed: int) -> list[Uses]:
    chance = random.Random(seed)
    if popularity == "composed":
        few = [composition(chance) for _ in range(4)]
        return [uses for uses in few for _ in range(-(-num_rows // len(few)))][:num_rows]
    if popularity == "some composed":
        return [composition(chance) if chance.random() < 0.5 else () for _ in range(num_rows)]
    return [(SlotUse(slot),) if slot >= 0 else () for slot in slots_of_rows(popularity, num_rows, seed)]


def composition(chance: random.Random) -> Uses:
    slots = chance.sample(range(len(RANKS)), chance.randint(1, 4))
    return tuple(SlotUse(slot, chance.choice([1.0, 0.3, -0.7, 0.0, 1.9])) for slot in slots)


def slots_of_rows(popularity: str, num_rows: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    every = range(len(RANKS))
    match popularity:
        case "one":
            return [chance.choice(every)] * num_rows
        case "uniform":
            return sorted(chance.choice(every) for _ in range(num_rows))
        case "zipf":
            return sorted(chance.choices(every, [1 / (1 + slot) for slot in every], k=num_rows))
        case "distinct":
            return sorted(row % len(RANKS) for row in range(num_rows))
        case "some base":
            return sorted(chance.choice([-1, -1, *every]) for _ in range(num_rows))
        case "only the first and the last":
            return sorted(chance.choice([0, len(RANKS) - 1]) for _ in range(num_rows))
    raise AssertionError(popularity)


POPULARITIES = (
    *("one", "uniform", "zipf", "distinct", "some base", "only the first and the last"),
    *("composed", "some composed"),
)


def exact(y: torch.Tensor, x: torch.Tensor, pool: Pool, rows: list[Uses]) -> torch.Tensor:
    """Compute the output row by row in float64, from the real columns of the row's adapters alone."""
    out = y.double()
    for row, uses in enumerate(rows):
        for slot, scale in uses:
            own = pool.columns[slot]
            out[row] += scale * (pool.a[own].double() @ x[row].double()) @ pool.b[own].double()
    return out


def apply(kernel: LoRAKernel, y: torch.Tensor, x: torch.Tensor, pool: Pool, rows: list[Uses]) -> torch.Tensor:
    segments = build_segments(((uses, 1) for uses in rows), pool.runs)
    out = y.clone()
    if segments:  # as the linears do: a step without adapters does not reach the kernel
        kernel.add_lora(out, x, pool.a[None], pool.b.flatten(), (y.shape[1],), kernel.plan_segments(segments))
    return out


def cases(num_rows: int) -> Iterator[tuple[str, int, int, int]]:
    """Every popularity, each with one of the sizes, which depends on the number of rows."""
    for index, popularity in enumerate(POPULARITIES):
        yield popularity, *SIZES[(index + num_rows) % len(SIZES)], index + num_rows


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 17, 33, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_computes_the_products_and_leaves_base_rows_alone(
    name: str, dtype: torch.dtype, num_rows: int
) -> None:
    kernel = KERNELS[name]()
    # A rounding of v (bf16 keeps 8 bits), one of the sum, and for outputs near 1 nothing more.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    for popularity, in_features, out_features, seed in cases(num_rows):
        pool = make_pool(seed, in_features, out_features, dtype)
        rows = uses_of_rows(popularity, num_rows, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
        y = torch.randn(num_rows, out_features, generator=generator).to(dtype)
        got = apply(kernel, y, x, pool, rows)
        torch.testing.assert_close(got.double(), exact(y, x, pool, rows), atol=tolerance, rtol=tolerance)
        assert torch.equal(apply(kernel, y, x, pool, rows).view(torch.uint8), got.view(torch.uint8))  # no race
        reference = apply(ReferenceKernel(), y, x, pool, rows)
        torch.testing.assert_close(got, reference, atol=tolerance, rtol=tolerance)
        base = [row for row, uses in enumerate(rows) if not any(use.scale for use in uses)]
        assert torch.equal(got[base].view(torch.uint8), y[base].view(torch.uint8))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_siblings_get_the_bits_of_one_call_for_each(name: str, dtype: torch.dtype, num_rows: int) -> None:
    kernel, sizes = KERNELS[name](), (200, 64, 64)
    pools = [make_pool(7, 576, size, dtype) for size in sizes]  # one layout of pages
    rows = uses_of_rows("some base", num_rows, 5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, 576, generator=generator).to(dtype)
    y = torch.randn(num_rows, sum(sizes), generator=generator).to(dtype)
    parts = [
        apply(kernel, part.contiguous(), x, pool, rows) for part, pool in zip(y.split(sizes, 1), pools, strict=True)
    ]
    a, b = torch.stack([pool.a for pool in pools]), torch.cat([pool.b.flatten() for pool in pools])
    segments = build_segments(((uses, 1) for uses in rows), pools[0].runs)
    kernel.add_lora(y, x, a, b, sizes, kernel.plan_segments(segments))
    assert torch.equal(y, torch.cat(parts, 1))


def test_the_deltas_are_large_enough_to_be_missed() -> None:
    """The tolerances above would not hide a delta that is missing or belongs to another row."""
    pool = make_pool(0, 64, 200, torch.float32)
    x, y = torch.randn(14, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(14, 200)
    slots = slots_of_rows("distinct", 14, 0)
    right = exact(y, x, pool, [(SlotUse(slot),) for slot in slots])
    wrong = exact(y, x, pool, [(SlotUse((slot + 1) % len(RANKS)),) for slot in slots])
    scaled = exact(y, x, pool, [(SlotUse(slot, 0.3),) for slot in slots])
    assert right.abs().amax(-1).min() > 0.1
    assert (right - wrong).abs().amax(-1).min() > 0.1
    assert (right - scaled).abs().amax(-1).min() > 0.1


@pytest.mark.parametrize("name", KERNELS)
def test_an_overflow_of_one_adapter_stays_in_its_own_rows(name: str) -> None:
    """Row 1's adapter overflows for everybody's input: inf in the intermediate, which times zero would be NaN."""
    pool = make_pool(0, 64, 200, torch.float32, scattered=False)
    rows = [
        (),
        (SlotUse(1),),
        (SlotUse(2), SlotUse(1, 0.5)),
        (SlotUse(3),),
        (SlotUse(2), SlotUse(3, 0.5)),
        (SlotUse(6),),
    ]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 64, generator=generator), torch.randn(6, 200, generator=generator)
    before = exact(y, x, pool, rows)
    pool.a[pool.columns[1]] = 3e38
    got = apply(KERNELS[name](), y, x, pool, rows)
    others = [0, 3, 4, 5]
    torch.testing.assert_close(got[others].double(), before[others], atol=2e-5, rtol=2e-5)
    assert torch.equal(got[0], y[0])
    assert not torch.isfinite(got[1:3]).all(-1).any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_row_does_not_spoil_its_neighbours(name: str, bad: float) -> None:
    pool = make_pool(0, 64, 200, torch.float32)
    rows = [(), (), (SlotUse(0),), (SlotUse(0),), (SlotUse(2),), (SlotUse(5),)]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 64, generator=generator), torch.randn(6, 200, generator=generator)
    before = exact(y, x, pool, rows)
    x[2], x[0] = bad, bad
    got = apply(KERNELS[name](), y, x, pool, rows)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(got[others].double(), before[others], atol=2e-5, rtol=2e-5)


def test_many_small_segments_use_the_dense_method_and_long_ones_do_not() -> None:
    kernel = GroupedKernel(CPU)
    runs = {slot: [(16 * slot, 16 * slot + 16)] for slot in range(8)}
    decode = kernel.plan_segments(build_segments((((SlotUse(slot),), 1) for slot in range(8)), runs))
    assert isinstance(decode, DensePlan)
    prefill = kernel.plan_segments(build_segments((((SlotUse(slot),), 500) for slot in range(8)), runs))
    assert isinstance(prefill, Segments)
    alone = kernel.plan_segments(build_segments([((SlotUse(3),), 1)], runs))
    assert isinstance(alone, Segments)


def test_reused_pages_keep_nothing_of_their_previous_adapter() -> None:
    """The next adapter does not change the module: not even an overflow through the old A may reach its rows."""
    pool = AdapterPool(ModelSpec({"m": (8, 8)}, 16), 1, torch.float32, CPU, KERNELS["chosen"]())
    slot = Slot(0, "", [0])
    last = RankColumns.zeros(16, {"m": (8, 8)}, torch.float32)
    a, b = last.views()["m"]
    a.fill_(3e38), b.fill_(1)
    pool.write(slot, PackedAdapter(1, last, nbytes=0))
    pool.write(slot, PackedAdapter(1, RankColumns.zeros(16, {}, torch.float32), nbytes=0))
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    plan = pool.kernel.plan_segments(build_segments([((SlotUse(0),), 2)], {0: [(0, 16)]}))
    pool.kernel.add_lora(y, x, *pool.stacked(("m",)), plan)
    assert torch.equal(y, torch.ones(2, 8))


PLAIN = FORMS[-1]


def test_the_native_kernel_is_compiled_once(tmp_path: Path) -> None:
    skip_unless_it_runs(PLAIN.name)
    library = compiled.build(SOURCE, PLAIN, tmp_path)
    built = library.stat().st_mtime_ns
    assert compiled.build(SOURCE, PLAIN, tmp_path) == library and library.stat().st_mtime_ns == built
    assert [file.name for file in tmp_path.iterdir()] == [library.name]


def test_a_c_compiler_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("there is no gcc")
    monkeypatch.setenv("CXX", found)
    assert NativeKernel(ctypes.CDLL(str(compiled.build(SOURCE, PLAIN, tmp_path)))).name == "native"


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_without_a_working_compiler_torch_is_used(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FORCED, raising=False)
    forget()
    try:
        kernel, reason = choose_kernel(CPU, torch.float32)
    finally:
        forget()
    assert kernel.name == "grouped" and compiler in reason
    assert not list(tmp_path.rglob("*.so"))


def test_a_dtype_without_a_native_kernel_uses_torch() -> None:
    kernel, reason = choose_kernel(CPU, torch.float16)
    assert kernel.name == "grouped" and "float16" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("in_features", "sizes"), [(576, (576, 192, 192)), (1536, (576,)), (77, (50,))], ids=str)
@pytest.mark.parametrize(("lo", "hi"), [(0, 16), (3, 10), (0, 48)])
@pytest.mark.parametrize("form", NATIVE_FORMS)
def test_a_row_has_the_same_bits_in_any_batch(
    form: str, dtype: torch.dtype, in_features: int, sizes: tuple[int, ...], lo: int, hi: int
) -> None:
    """The native kernel takes two or four rows at once; the order of additions is the same for any other rows."""
    kernel, generator = native_kernel(form), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = 300  # a long prompt
    x, y, a, b = (
        drawn(rows, in_features),
        drawn(rows, sum(sizes)),
        drawn(len(sizes), 64, in_features),
        drawn(64 * sum(sizes)),
    )
    together = y.clone()
    kernel.add_lora(together, x, a, b, sizes, kernel.plan_segments(Segments((Segment(0, rows, lo, hi),))))
    for start, end in [(0, 1), (1, 3), (3, 6), (6, 10), (2, 7), (10, 11), (5, 270)]:
        part = y[start:end].clone()
        kernel.add_lora(
            part, x[start:end], a, b, sizes, kernel.plan_segments(Segments((Segment(0, end - start, lo, hi),)))
        )
        assert torch.equal(part, together[start:end])

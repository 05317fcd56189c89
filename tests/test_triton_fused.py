"""The fused kernels against their specification, with what adapters add and without; base rows keep their bits beside
adapters. In Triton's interpreter, or with `make test-gpu` on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters.kernels.segments import Segments, SlotUse, build_segments
from server.model.fused import reference
from tests.fixtures.triton_device import DEVICE, DTYPES, EPSILON, require_triton
from tests.test_kernels import Pool, make_pool

require_triton()

from adapters.kernels.triton_lora import Delta, TritonKernel
from server.model.fused import triton_fused

KERNEL = TritonKernel(DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Adapters by slot, see make_pool; two of them on one row; the base; one of them twice.
USES = [(SlotUse(2),), (), (SlotUse(0, 0.5), SlotUse(3)), (), (SlotUse(5),), (SlotUse(5),)]


class Adapters:
    """Adapters of ranks 1 to 64 over sibling linears of `sizes`, and what they add to the rows of a step."""

    def __init__(self, rows: int, in_features: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.pools: list[Pool] = [make_pool(3, in_features, size, dtype) for size in sizes]  # one layout of pages
        self.uses = USES[:rows]
        self.segments = build_segments(((own, 1) for own in self.uses), self.pools[0].runs)
        self.x, self.sizes = random(rows, in_features, dtype=dtype, seed=5), sizes
        self.base = [row for row, own in enumerate(self.uses) if not own]

    def exact(self) -> torch.Tensor:
        """Float64 `[rows, sum(sizes)]`."""
        parts = [torch.zeros(len(self.x), size, dtype=torch.float64) for size in self.sizes]
        for part, pool in zip(parts, self.pools, strict=True):
            for s in self.segments.items:
                v = self.x[s.start : s.end].double() @ pool.a[s.lo : s.hi].double().T
                part[s.start : s.end] += s.scale * v @ pool.b[s.lo : s.hi].double()
        return torch.cat(parts, 1)

    def delta(self, static: bool = False) -> Delta:
        """Columns that no segment of the step names are NaN."""
        named = [column for s in self.segments.items for column in range(s.lo, s.hi)]
        a, b = (torch.full_like(torch.stack([getattr(p, kind) for p in self.pools]), torch.nan) for kind in ("a", "a"))
        a[:, named] = torch.stack([pool.a for pool in self.pools])[:, named]
        flat = [torch.full_like(pool.b, torch.nan) for pool in self.pools]
        for own, pool in zip(flat, self.pools, strict=True):
            own[named] = pool.b[named]
        b = torch.cat([own.flatten() for own in flat])
        plan = KERNEL.plan_segments(self.segments)
        if static:
            plan = KERNEL.static_plan(len(self.x) + 3)
            assert KERNEL.refill(plan, Segments(self.segments.items[:1]))  # what is left of it must not show
            assert KERNEL.refill(plan, self.segments)
        return KERNEL.shrink(self.x.to(DEVICE), a.to(DEVICE), b.to(DEVICE), self.sizes, plan)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2 * EPSILON[dtype]
    torch.testing.assert_close(got.cpu().double(), want.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 200, 576])
def test_norms(hidden: int, dtype: torch.dtype) -> None:
    x, residual = (random(5, hidden, dtype=dtype, seed=seed) for seed in range(2))
    weight = random(hidden, dtype=dtype, seed=2)
    wide = torch.full((5, hidden + 24), torch.nan, dtype=dtype)
    wide[:, :hidden] = x
    own = wide.to(DEVICE)[:, :hidden]
    close(triton_fused.rms_norm(own, weight.to(DEVICE), 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    got = triton_fused.add_rms_norm(own, residual.to(DEVICE), weight.to(DEVICE), 1e-5)
    want = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(got[1].cpu(), want[1])
    close(got[0], want[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu(dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 700, dtype=dtype) * 20
    close(triton_fused.silu_mul(gate_up.to(DEVICE)) / 20, reference.silu_mul(gate_up) / 20, dtype)


class Cache:
    """Rows with a place in a paged cache, apart from the second."""

    def __init__(self, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys, self.values = (torch.zeros(4, 16, kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in "kv")
        self.slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:rows].to(DEVICE)
        self.slots[1] = -1


SHAPES = [(4, 2, 16, 16), (3, 1, 24, 24), (2, 2, 32, 8), (9, 3, 64, 64)]  # heads, kv_heads, head_dim, rotary


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_and_the_cache(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, rotary = shape
    qkv = random(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = random(5, rotary // 2, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got, want = Cache(5, kv_heads, head_dim, dtype), Cache(5, kv_heads, head_dim, dtype)
    query = triton_fused.rope_kv_write(*(t.to(DEVICE) for t in (qkv, cos, sin)), got.keys, got.values, got.slots)
    keys, values = want.keys.cpu(), want.values.cpu()
    close(query, reference.rope_kv_write(qkv, cos, sin, keys, values, want.slots.cpu()), dtype)
    close(got.keys, keys, dtype)
    assert torch.equal(got.values.cpu(), values) and (values.flatten(1).abs().sum(1) > 0).any()
    empty = [slot for slot in range(64) if slot not in got.slots.tolist()]
    assert not got.keys.flatten(0, 1)[empty].any()


Call = Callable[[Any, Any], list[torch.Tensor]]  # of a module and a delta: results by row


def consumers(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[tuple[int, ...], Call]]:
    """Sizes of the linears whose output each function reads, and its call over six rows of such an output."""
    gate_up, x, residual = (
        random(6, size, dtype=dtype, seed=seed).to(device) for seed, size in enumerate((600, 200, 200))
    )
    qkv, weight = random(6, 6 * 24, dtype=dtype, seed=7).to(device), random(200, dtype=dtype, seed=8).to(device)
    angles = random(6, 12, seed=9).repeat(1, 2)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def rope(module: Any, delta: Any) -> list[torch.Tensor]:
        cache = Cache(6, 2, 24, dtype)
        keys, values, slots = cache.keys.to(device), cache.values.to(device), cache.slots.to(device)
        query = module.rope_kv_write(qkv, cos, sin, keys, values, slots, delta)
        return [query, *(kind.flatten(0, 1)[slots] * (slots >= 0)[:, None, None] for kind in (keys, values))]

    return {
        "silu_mul": ((300, 300), lambda module, delta: [module.silu_mul(gate_up, delta)]),
        "add_rms_norm": ((200,), lambda module, delta: [*module.add_rms_norm(x, residual, weight, 1e-5, delta)]),
        "rope_kv_write": ((48, 48, 48), rope),
    }


@pytest.mark.parametrize("function", ["silu_mul", "add_rms_norm", "rope_kv_write"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_adapters_add_is_in_the_result_and_base_rows_keep_their_bits(dtype: torch.dtype, function: str) -> None:
    sizes, call = consumers(dtype, DEVICE)[function]
    adapters = Adapters(6, 576, sizes, dtype)
    plain, got = call(triton_fused, None), call(triton_fused, adapters.delta())
    want = consumers(dtype, torch.device("cpu"))[function][1](reference, adapters.exact().float())
    for own, specified, without in zip(got, want, plain, strict=True):
        close(own, specified, dtype)
        assert torch.equal(own[adapters.base], without[adapters.base])
    assert all(torch.equal(*pair) for pair in zip(got, call(triton_fused, adapters.delta(static=True)), strict=True))


@pytest.mark.parametrize("function", ["silu_mul", "add_rms_norm", "rope_kv_write"])
def test_a_row_s_bits_do_not_depend_on_its_batch(function: str) -> None:
    sizes, call = consumers(torch.bfloat16, DEVICE)[function]
    adapters = Adapters(6, 576, sizes, torch.bfloat16)
    together = call(triton_fused, adapters.delta())
    kept = next(row for row, own in enumerate(adapters.uses) if len(own) > 1)
    adapters.segments = build_segments(
        ((own if row == kept else (), 1) for row, own in enumerate(adapters.uses)), adapters.pools[0].runs
    )
    alone = call(triton_fused, adapters.delta())
    assert all(torch.equal(own[kept], beside[kept]) for own, beside in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], together[0])

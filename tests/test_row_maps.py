"""Row maps: functions of an adapter's rows before or after a linear, and what is added to its output."""

from typing import Any

import pytest
import torch
from torch import nn

from adapters.kernels.reference import ReferenceKernel
from adapters.kernels.segments import Segment, Segments, SlotRows
from adapters.model_spec import ModelSpec
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.mapped_weight import mapped_weight
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from adapters.runtime.row_maps import Circulant, RotatedBlocks, RotatedPairs, RowMaps, Sparse
from adapters.runtime.stacked_linear import stack
from adapters.weights import PairRotation, SparseDelta

CPU = torch.device("cpu")
SPEC = ModelSpec({"q": (8, 8), "k": (8, 4)}, max_rank=16, siblings=(("q", "k"),))


class Counted(nn.Module):
    """A linear that notes the rows of each of its calls."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.calls = linear, list[int]()
        self.in_features = linear.in_features

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x.numel() // x.shape[-1])
        found: torch.Tensor = self.linear(x)
        return found


def pool_with(**maps: RowMaps) -> AdapterPool:
    pool = AdapterPool(SPEC, 2, torch.float32, CPU, ReferenceKernel())
    pool.write(Slot(1, "", [1]), PackedAdapter(1, RankColumns.zeros(16, {}, torch.float32), 0, row_maps=maps))
    return pool


def of_slot_1(start: int, end: int, scale: float = 1.0) -> Segments:
    return Segments((Segment(start, end, 16, 32, scale),), (SlotRows(1, start, end, scale),))


def blocks(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 4)


def sparse() -> SparseDelta:
    return SparseDelta(torch.tensor([[0, 3, 3, 7], [1, 2, 2, 5]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), (8, 8))


@torch.inference_mode()
def test_siblings_have_rotations_of_their_own_and_the_base_runs_once() -> None:
    of_q, of_k = RotatedBlocks(blocks()), RotatedBlocks(blocks(1))
    pool = pool_with(q=RowMaps(before=of_q), k=RowMaps(before=of_k))
    counted = []

    def finish(linear: nn.Linear) -> nn.Module:
        counted.append(Counted(linear))
        return counted[-1]

    group = LoRAGroup(("q", "k"), stack([nn.Linear(8, 8), nn.Linear(8, 4)], finish), pool, pool.state.tokens)
    x = torch.randn(1, 5, 8)
    with pool.step(of_slot_1(1, 3), num_tokens=5):
        y = group(x)[0]
    (base,) = counted
    assert base.calls == [5 + 2 * 2]
    plain = base.linear(x[0])
    assert torch.equal(y[[0, 3, 4]], plain[[0, 3, 4]])
    torch.testing.assert_close(y[1:3, :8], base.linear(of_q(x[0, 1:3]))[:, :8])
    torch.testing.assert_close(y[1:3, 8:], base.linear(of_k(x[0, 1:3]))[:, 8:])
    with pool.step(of_slot_1(0, 0), num_tokens=5):
        assert torch.equal(group(x)[0], plain)


@torch.inference_mode()
def test_what_is_added_is_scaled_and_comes_last() -> None:
    rotation = RotatedPairs(PairRotation(torch.randn(8), torch.randn(8), 2))
    pool = pool_with(q=RowMaps(after=rotation, added=Sparse(sparse())))
    base = nn.Linear(8, 8)
    group = LoRAGroup(("q",), base, pool, pool.state.tokens)
    x = torch.randn(4, 8)
    with pool.step(of_slot_1(2, 4, scale=-0.5), num_tokens=4):
        y = group(x)
    delta = torch.zeros(8, 8)
    delta[0, 1], delta[3, 2], delta[7, 5] = 1, 5, 4  # those at one place are summed
    torch.testing.assert_close(y[2:], rotation(base(x[2:])) - 0.5 * x[2:] @ delta.T)
    assert torch.equal(y[:2], base(x)[:2])


MAPS: dict[str, Any] = {
    "blocks": lambda: RotatedBlocks(blocks()),
    "one block": lambda: RotatedBlocks(blocks(1)),
    "pairs": lambda: RotatedPairs(PairRotation(torch.randn(8), torch.randn(8), 4)),
    "sparse": lambda: Sparse(sparse()),
    "circulant": lambda: Circulant(torch.randn(2, 2, 4)),
}


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
@torch.inference_mode()
def test_maps_are_linear_and_keep_the_dtype_of_rotations(make: Any) -> None:
    own = make()
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(own(2 * x - y), 2 * own(x) - own(y))
    torch.testing.assert_close(own(x)[1:2], own(x[1:2]))
    if not isinstance(own, Sparse | Circulant):
        assert own(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["before", "after", "added"])
@torch.inference_mode()
def test_a_merged_weight_computes_what_the_maps_do(place: str) -> None:
    maps = {
        "before": RowMaps(before=RotatedBlocks(blocks())),
        "after": RowMaps(after=RotatedPairs(PairRotation(torch.randn(8), torch.randn(8), 2))),
        "added": RowMaps(added=Circulant(torch.randn(2, 2, 4))),
    }[place]
    weight, x = torch.randn(8, 8), torch.randn(3, 8)
    y = (x if maps.before is None else maps.before(x)) @ weight.T
    y = y if maps.after is None else maps.after(y)
    y = y if maps.added is None else y + maps.added(x)
    torch.testing.assert_close(x @ mapped_weight(weight, maps, None).T, y, atol=1e-5, rtol=1e-5)


def test_a_slot_counts_its_maps_and_frees_them() -> None:
    pool = pool_with(q=RowMaps(before=RotatedBlocks(blocks())))
    assert pool.extra_bytes() == {1: 2 * 4 * 4 * 4} and not pool.planner.have_only_lora((SlotRows(1, 0, 1),))
    pool.write(Slot(1, "", [1]), PackedAdapter(1, RankColumns.zeros(16, {}, torch.float32), 0))
    assert not pool.extra_bytes()
    other = pool_with(q=RowMaps(added=Sparse(sparse())))
    other.release(1)
    assert not other.extra_bytes() and other.planner.have_only_lora((SlotRows(1, 0, 1),))

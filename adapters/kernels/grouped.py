"""The LoRA product in plain torch matmuls, for any device.

Two methods, chosen per step by the work that they would do:

  per segment   two small matmuls for each segment: no wasted arithmetic, but a fixed cost per segment and linear
  dense         one pair of matmuls over every column from the lowest in use to the highest, with the columns of other
                adapters masked out in between: wasted arithmetic, but a fixed cost per linear only

Decode batches of many adapters use the dense method, prefill chunks the other one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adapters.kernels.contract import split_b
from adapters.kernels.segments import Segment, Segments

# Cost of one more segment, in units of (row x column) of wasted dense work. Measured on a CPU at hidden size 576: a
# segment's two matmuls have a fixed cost of about 40 us, in which the dense method computes some 4,000 row-columns.
SEGMENT_COST = 4096


@dataclass(frozen=True, slots=True)
class DensePlan:
    """Rows `[start, end)` against columns `[lo, hi)`; `foreign[row, column]` marks the columns of other adapters.
    `scales` has the same shape, in float32; None when all are 1."""

    start: int
    end: int
    lo: int
    hi: int
    foreign: torch.Tensor
    scales: torch.Tensor | None = None


class GroupedKernel:
    """Torch matmuls, per segment or dense."""

    name = "grouped"

    def __init__(self, device: torch.device):
        self._device = device

    def plan_segments(self, segments: Segments) -> DensePlan | Segments:
        items = segments.items
        if len(items) < 2:
            return segments
        start, end = min(s.start for s in items), max(s.end for s in items)
        lo, hi = min(s.lo for s in items), max(s.hi for s in items)
        own_work = sum((s.end - s.start) * (s.hi - s.lo) for s in items)
        if (end - start) * (hi - lo) > own_work + SEGMENT_COST * len(items):
            return segments
        return self._dense(items, start, end, lo, hi)

    def _dense(self, items: tuple[Segment, ...], start: int, end: int, lo: int, hi: int) -> DensePlan:
        foreign = torch.ones(end - start, hi - lo, dtype=torch.bool)
        scales = torch.ones(end - start, hi - lo) if any(s.scale != 1 for s in items) else None
        for s in items:
            own = slice(s.start - start, s.end - start), slice(s.lo - lo, s.hi - lo)
            foreign[own] = False
            if scales is not None:
                scales[own] = s.scale
        return DensePlan(
            start, end, lo, hi, foreign.to(self._device), None if scales is None else scales.to(self._device)
        )

    def add_lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        sizes: tuple[int, ...],
        plan: DensePlan | Segments,
    ) -> None:
        for own_y, own_a, own_b in zip(torch.split(y, list(sizes), 1), a, split_b(b, a.shape[1], sizes), strict=True):
            if isinstance(plan, DensePlan):
                _add_dense(own_y, x, own_a, own_b, plan)
            else:
                add_segments(own_y, x, own_a, own_b, plan.items)


def add_segments(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, segments: Iterable[Segment]
) -> None:
    """Add each segment's delta to `y` in place, with two matmuls for each; `a` and `b`, both `[columns, features]`,
    belong to one linear."""
    for s in segments:
        _add_product(y[s.start : s.end], _shrunk(x[s.start : s.end], a[s.lo : s.hi]), b[s.lo : s.hi], s.scale)


def _add_dense(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: DensePlan) -> None:
    v = _shrunk(x[plan.start : plan.end], a[plan.lo : plan.hi])
    if plan.scales is not None:
        v *= plan.scales
    v.masked_fill_(plan.foreign, 0)  # not a product with 0: another adapter's overflow must not become NaN
    _add_product(y[plan.start : plan.end], v, b[plan.lo : plan.hi])


def _shrunk(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return `x @ a.T`, on a CPU in float32: rounded to bf16 in between, adapters of large ranks lost too much."""
    return x.float() @ a.float().T if x.device.type == "cpu" else x @ a.T


def _add_product(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """Add `scale * (v @ b)` to `y` in place, rounded once."""
    if v.dtype is y.dtype:
        y.addmm_(v, b, alpha=scale)
    else:
        y.copy_(torch.addmm(y.float(), v, b.float(), alpha=scale))

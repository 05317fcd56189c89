"""Device tier: the tensors that hold the resident adapters' rank columns, and what a step reads of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapters.affine import AffinePlan, AffineTables
from adapters.errors import AdapterInvalid, Problem
from adapters.fold import dora_scale, output_vectors
from adapters.format import AdapterWeights, LoraFactors
from adapters.kernels import LoRAKernel
from adapters.segments import NO_SEGMENTS, Segments
from adapters.slots import PAGE_COLUMNS, Slot
from adapters.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A version in the pool's own layout and dtype: per module A `[columns, in]` and B `[columns, out]` with the
    scaling (and DoRA's) folded in before rounding, zero-padded to whole pages. `vectors` are the output vectors of
    the modules that have some."""

    num_pages: int
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    nbytes: int
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)


def pack(weights: AdapterWeights, dtype: torch.dtype, bases: Mapping[str, nn.Module]) -> PackedAdapter:
    """Convert checked weights for the linears in `bases` to the pool's layout. Runs in a reader thread.

    Raises `AdapterInvalid` when a weight is finite in its own dtype but not in `dtype`.
    """
    num_pages = -(-weights.rank // PAGE_COLUMNS)
    modules, vectors = {}, {}
    for name in weights.factors.keys() | weights.biases.keys():
        factors = weights.factors.get(name)
        scale = None if factors is None else dora_scale(bases[name], factors)
        if factors is not None:
            modules[name] = _columns(factors, scale, num_pages, dtype)
        affine = output_vectors(bases[name], scale, factors, weights.biases.get(name))
        if affine is not None:
            vectors[name] = affine
        _check_finite(name, dtype, [*modules.get(name, ()), *vectors.get(name, ())])
    tensors = [*(tensor for pair in modules.values() for tensor in pair), *vectors.values()]
    return PackedAdapter(num_pages, modules, sum(t.numel() * t.element_size() for t in tensors), vectors)


def _columns(
    factors: LoraFactors, scale: torch.Tensor | None, num_pages: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    b = factors.b.float() * factors.scaling
    if scale is not None:
        b *= scale[:, None]
    return _padded(factors.a.to(dtype), num_pages), _padded(b.to(dtype).T, num_pages)


def _check_finite(name: str, dtype: torch.dtype, tensors: list[torch.Tensor]) -> None:
    if not all(tensor.to(dtype).isfinite().all() for tensor in tensors):
        raise AdapterInvalid(
            [Problem(name, f"weights beyond {dtype}", "a scaled B that the base's dtype can hold", "nonfinite")]
        )


def _padded(columns: torch.Tensor, num_pages: int) -> torch.Tensor:
    padded = columns.new_zeros(num_pages * PAGE_COLUMNS, columns.shape[1])
    padded[: columns.shape[0]] = columns
    return padded


class StepPlan:
    """What the wrapped linears of one kind read during a step; set before the forward, the same object for all."""

    __slots__ = ("active", "affine", "plan")

    def __init__(self) -> None:
        self.active = False
        self.plan: Any = None
        self.affine: AffinePlan | None = None  # None unless an adapter of the step has output vectors


class AdapterPool:
    """Per adaptable module one A and one B buffer of `num_pages * 16` rank columns.

    Writing goes to pages that no running sequence refers to, so it may happen in another thread during a step.
    Invariant: B holds only finite numbers at all times, in use or not (kernels multiply unused columns by zero).
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, dtype: torch.dtype, device: torch.device, kernel: LoRAKernel
    ) -> None:
        columns = num_pages * PAGE_COLUMNS
        self.dtype = dtype
        self.kernel = kernel
        self.affine = AffineTables(device)
        self.buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            name: (
                torch.zeros(columns, in_features, dtype=dtype, device=device),
                torch.zeros(columns, out_features, dtype=dtype, device=device),
            )
            for name, (in_features, out_features) in spec.modules.items()
        }
        self.token_plan = StepPlan()  # for linears that see every token of the step
        self.head_plan = StepPlan()  # for the output head, which sees only the rows that are sampled from

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Fill the slot with an adapter; modules that it does not touch become zero."""
        self.affine.write(slot.index, packed.vectors)
        for name, (a, b) in self.buffers.items():
            source = packed.modules.get(name)
            for index, page in enumerate(slot.pages):
                rows = slice(page * PAGE_COLUMNS, (page + 1) * PAGE_COLUMNS)
                if source is None:
                    a[rows], b[rows] = 0, 0  # A as well: what is left of another's could overflow, and inf * 0 is NaN
                else:
                    own = slice(index * PAGE_COLUMNS, (index + 1) * PAGE_COLUMNS)
                    a[rows], b[rows] = source[0][own], source[1][own]

    def set_step(self, tokens: Segments, head: Segments = NO_SEGMENTS) -> None:
        """Make `tokens` and `head` the segments of the forward that follows."""
        for plan, segments in ((self.token_plan, tokens), (self.head_plan, head)):
            plan.active = bool(segments)
            plan.plan = self.kernel.plan(segments) if segments else None
            plan.affine = self.affine.plan(segments.rows) if segments else None

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.buffers.values() for t in pair)

"""Device tier: the tensors that hold the resident adapters' rank columns, and what a step reads of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adapters.errors import AdapterInvalid, Problem
from adapters.kernels import LoRAKernel
from adapters.segments import NO_SEGMENTS, Segments
from adapters.slots import PAGE_COLUMNS
from adapters.spec import ModelSpec

if TYPE_CHECKING:
    from adapters.format import AdapterWeights


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A version in the pool's own layout and dtype: per module A `[columns, in]` and B `[columns, out]` with the
    scaling folded in before rounding, zero-padded to whole pages."""

    num_pages: int
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    nbytes: int


def pack(weights: "AdapterWeights", dtype: torch.dtype) -> PackedAdapter:
    """Convert checked weights to the pool's layout. Runs in a reader thread.

    Raises `AdapterInvalid` when a weight is finite in its own dtype but not in `dtype`.
    """
    num_pages = -(-weights.rank // PAGE_COLUMNS)
    modules = {}
    for name, factors in weights.factors.items():
        a = _padded(factors.a.to(dtype), num_pages)
        b = _padded((factors.b.float() * factors.scaling).to(dtype).T, num_pages)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterInvalid(
                [Problem(name, f"weights beyond {dtype}", "a scaled B that the base's dtype can hold", "nonfinite")]
            )
        modules[name] = (a, b)
    nbytes = sum(t.numel() * t.element_size() for pair in modules.values() for t in pair)
    return PackedAdapter(num_pages, modules, nbytes)


def _padded(columns: torch.Tensor, num_pages: int) -> torch.Tensor:
    padded = columns.new_zeros(num_pages * PAGE_COLUMNS, columns.shape[1])
    padded[: columns.shape[0]] = columns
    return padded


class StepPlan:
    """What the wrapped linears of one kind read during a step; set before the forward, the same object for all."""

    __slots__ = ("active", "plan")

    def __init__(self) -> None:
        self.active = False
        self.plan: Any = None


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
        self.buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            name: (
                torch.zeros(columns, in_features, dtype=dtype, device=device),
                torch.zeros(columns, out_features, dtype=dtype, device=device),
            )
            for name, (in_features, out_features) in spec.modules.items()
        }
        self.token_plan = StepPlan()  # for linears that see every token of the step
        self.head_plan = StepPlan()  # for the output head, which sees only the rows that are sampled from

    def write(self, pages: list[int], packed: PackedAdapter) -> None:
        """Fill the pages with an adapter; modules that it does not touch become zero."""
        for name, (a, b) in self.buffers.items():
            source = packed.modules.get(name)
            for index, page in enumerate(pages):
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

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.buffers.values() for t in pair)

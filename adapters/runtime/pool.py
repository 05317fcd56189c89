"""Device tier: the tensors that hold the resident adapters' rank columns, and what a step reads of them."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from adapters.device.lazy_zeros import zeros
from adapters.kernels.contract import LoRAKernel, split_b
from adapters.kernels.segments import NO_SEGMENTS, Segments, SlotRows
from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.module_overrides import OverlayPlan, OverlayTable
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.scale_shift import AffinePlan, AffineTables


class StepPlan:
    """What the modules of one kind read during a step; set before the forward, the same object for all."""

    __slots__ = ("active", "affine", "input_affine", "modules", "overlays", "plan")

    def __init__(self) -> None:
        self.active = False
        self.plan: Any = None
        self.modules: frozenset[str] | None = None  # in which an adapter of the step has A and B; None: perhaps all
        self.affine: AffinePlan | None = None  # None unless an adapter of the step has output vectors
        self.input_affine: AffinePlan | None = None  # the same for inputs
        self.overlays: OverlayPlan | None = None  # likewise

    def is_lora_alone(self) -> bool:
        """Whether A and B are all that the step's adapters have."""
        return self.affine is None and self.input_affine is None and self.overlays is None

    def touches(self, names: Iterable[str]) -> bool:
        """Whether A and B have to be added in any of `names`."""
        return self.active and (self.modules is None or not self.modules.isdisjoint(names))


class Stack(NamedTuple):
    """The buffers of siblings as the kernels take them (see adapters/kernels): `a [linears, columns, in_features]`,
    `b` flat, `sizes` the linears' out_features."""

    a: torch.Tensor
    b: torch.Tensor
    sizes: tuple[int, ...]


def page_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Device memory of one page in all modules: a version takes so much for every 16 of its rank."""
    return PAGE_COLUMNS * sum(map(sum, spec.modules.values())) * dtype.itemsize


class AdapterPool:
    """Per adaptable module one A and one B buffer of `num_pages * 16` rank columns; those of siblings are parts of one
    tensor.

    Writing goes to pages that no running sequence refers to, so it may happen in another thread during a step; on a GPU
    it is queued behind those on their way.
    Invariant: B holds only finite numbers at all times, in use or not (kernels multiply unused columns by zero).
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, dtype: torch.dtype, device: torch.device, kernel: LoRAKernel
    ) -> None:
        columns = num_pages * PAGE_COLUMNS
        self.dtype = dtype
        self.kernel = kernel
        self.affine = AffineTables(device)
        self.input_affine = AffineTables(device)
        self.overlays = OverlayTable(device)
        self.install_hook: Callable[[str], None] | None = None  # set when the model is attached
        self._vocab_sizes: dict[int, int] = {}  # of slots whose vocabulary is not the base's
        self._modules: dict[int, frozenset[str]] = {}  # by slot, those with A and B
        self.buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacks: dict[tuple[str, ...], Stack] = {}
        for names in spec.groups():
            sizes = tuple(spec.modules[name][1] for name in names)
            a = zeros(len(names), columns, spec.modules[names[0]][0], dtype=dtype, device=device)
            b = zeros(columns * sum(sizes), dtype=dtype, device=device)
            self._stacks[names] = Stack(a, b, sizes)
            for name, own_a, own_b in zip(names, a, split_b(b, columns, sizes), strict=True):
                self.buffers[name] = own_a, own_b
                self._stacks[name,] = Stack(own_a[None], own_b.flatten(), (own_b.shape[1],))
        self.token_plan = StepPlan()  # for linears that see every token of the step
        self.head_plan = StepPlan()  # for the output head, which sees only the rows that are sampled from

    def stacked(self, names: tuple[str, ...]) -> Stack:
        """What `add_lora` takes for siblings of the spec, or for one module."""
        return self._stacks[names]

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Fill the slot with an adapter; modules that it does not touch become zero."""
        self.affine.write(slot.index, packed.vectors)
        self.input_affine.write(slot.index, packed.input_vectors)
        self.overlays.write(slot.index, packed.overlays)
        self._modules[slot.index] = frozenset(packed.columns.widths)
        self._vocab_sizes.pop(slot.index, None)
        if packed.vocab_size is not None:
            self._vocab_sizes[slot.index] = packed.vocab_size
        sources = packed.columns.views()
        for name, (a, b) in self.buffers.items():
            source = sources.get(name)
            for index, page in enumerate(slot.pages):
                rows = slice(page * PAGE_COLUMNS, (page + 1) * PAGE_COLUMNS)
                if source is None:
                    a[rows], b[rows] = 0, 0  # A as well: what is left of another's could overflow, and inf * 0 is NaN
                else:
                    own = slice(index * PAGE_COLUMNS, (index + 1) * PAGE_COLUMNS)
                    a[rows], b[rows] = source[0][own], source[1][own]

    def set_step(
        self, tokens: Segments, head: Segments = NO_SEGMENTS, *, num_tokens: int = 0, num_head: int = 0
    ) -> None:
        """Make `tokens` and `head` the segments of the forward that follows, over so many rows."""
        steps = ((self.token_plan, tokens, num_tokens), (self.head_plan, head, num_head))
        for plan, segments, num_rows in steps:
            plan.active = bool(segments)
            plan.plan = self.kernel.plan(segments) if segments else None
            plan.modules = self._modules_of(segments.rows) if segments.rows else None
            plan.affine = self.affine.plan(segments.rows) if segments else None
            plan.input_affine = self.input_affine.plan(segments.rows) if segments else None
            plan.overlays = self.overlays.plan(segments.rows, num_rows) if segments else None
            if plan.overlays is not None:
                assert self.install_hook is not None
                self.overlays.hook(plan.overlays, self.install_hook)

    def _modules_of(self, rows: Iterable[SlotRows]) -> frozenset[str] | None:
        modules = {self._modules.get(owned.slot) for owned in rows}
        return None if None in modules else _union(frozenset(modules))

    def vocab_size(self, slot: int) -> int | None:
        """Of the adapter in `slot`, where it is not the base's."""
        return self._vocab_sizes.get(slot)

    def widths(self) -> dict[str, tuple[int, int]]:
        """In- and out-features by module."""
        return {name: (a.shape[1], b.shape[1]) for name, (a, b) in self.buffers.items()}

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.buffers.values() for t in pair)


@lru_cache(maxsize=256)
def _union(sets: frozenset[frozenset[str]]) -> frozenset[str]:
    """The same object for the same `sets`, by which layers see that nothing changed."""
    return frozenset().union(*sets)

"""Device tier: the tensors that hold the rank columns of the resident adapters, and the per-step plans that read
them."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from adapters.device.lazy_zeros import zeros
from adapters.kernels.contract import LoRAKernel, split_b
from adapters.kernels.segments import NO_SEGMENTS, Segments, SlotRows
from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.module_overrides import ModuleOverridePlan, ModuleOverrideTable
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.scale_shift import ScaleShiftPlan, ScaleShiftTables


class StepPlan:
    """The inputs of all modules of one kind during a step; set before the forward. All modules share one object."""

    __slots__ = ("active", "input_scale_shift", "kernel_plan", "module_overrides", "modules", "scale_shift")

    def __init__(self) -> None:
        self.active = False
        self.kernel_plan: Any = None
        self.modules: frozenset[str] | None = None  # those with A and B of an adapter of the step; None: any
        self.scale_shift: ScaleShiftPlan | None = None  # None unless an adapter of the step has output vectors
        self.input_scale_shift: ScaleShiftPlan | None = None  # the same for input vectors
        self.module_overrides: ModuleOverridePlan | None = None  # None unless an adapter of the step has overrides

    def is_lora_alone(self) -> bool:
        """Return True if the step's adapters have nothing but A and B."""
        return self.scale_shift is None and self.input_scale_shift is None and self.module_overrides is None

    def touches(self, names: Iterable[str]) -> bool:
        """Return True if A and B have to be added in any of `names`."""
        return self.active and (self.modules is None or not self.modules.isdisjoint(names))


class Stack(NamedTuple):
    """The buffers of siblings in the kernels' layout (see `adapters.kernels.contract`): `a [linears, columns,
    in_features]`, `b` flat, `sizes` the linears' out_features."""

    a: torch.Tensor
    b: torch.Tensor
    sizes: tuple[int, ...]


def page_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the device memory of one page in all modules, in bytes. A version takes one page for every 16 of its
    rank."""
    return PAGE_COLUMNS * sum(map(sum, spec.modules.values())) * dtype.itemsize


class AdapterPool:
    """One A and one B buffer of `num_pages * 16` rank columns per adaptable module; the buffers of siblings are views
    of one tensor.

    Writes go to pages that no running sequence refers to, so they may happen in another thread during a step; on a GPU
    a write is queued behind the steps in flight. Invariant: B holds only finite numbers at all times, in use or not
    (kernels multiply unused columns by zero).
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, dtype: torch.dtype, device: torch.device, kernel: LoRAKernel
    ) -> None:
        columns = num_pages * PAGE_COLUMNS
        self.dtype = dtype
        self.kernel = kernel
        self.scale_shift = ScaleShiftTables(device)
        self.input_scale_shift = ScaleShiftTables(device)
        self.module_overrides = ModuleOverrideTable(device)
        self.install_hook: Callable[[str], None] | None = None  # set by `attach`
        self._vocab_sizes: dict[int, int] = {}  # by slot, where the vocabulary differs from the base's
        self._modules: dict[int, frozenset[str]] = {}  # by slot, the modules with A and B
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
        self.head_plan = StepPlan()  # for the output head, which sees only the rows to sample

    def stacked(self, names: tuple[str, ...]) -> Stack:
        """Return the `add_lora` buffers of a group of siblings of the spec, or of one module."""
        return self._stacks[names]

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Write an adapter into the slot; modules that it does not touch become zero."""
        self.scale_shift.write(slot.index, packed.vectors)
        self.input_scale_shift.write(slot.index, packed.input_vectors)
        self.module_overrides.write(slot.index, packed.module_overrides)
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
                    # A as well: the columns of an earlier adapter could overflow, and inf * 0 is NaN.
                    a[rows], b[rows] = 0, 0
                else:
                    own = slice(index * PAGE_COLUMNS, (index + 1) * PAGE_COLUMNS)
                    a[rows], b[rows] = source[0][own], source[1][own]

    def release(self, slot: int) -> None:
        """Free what the slot's adapter keeps beside its pages. The pages are overwritten by their next adapter."""
        for table in (self.scale_shift, self.input_scale_shift, self.module_overrides):
            table.clear(slot)
        self._vocab_sizes.pop(slot, None)
        self._modules.pop(slot, None)

    def extra_tensors(self, slot: int) -> list[torch.Tensor]:
        """Return the tensors that the slot's adapter keeps on the device beside its pages."""
        tables = (self.scale_shift, self.input_scale_shift, self.module_overrides)
        return [tensor for table in tables for tensor in table.tensors(slot)]

    def extra_bytes(self) -> dict[int, int]:
        """Return the size of what adapters keep beside their pages, by slot; slots without any are absent."""
        slots = self.scale_shift.slots() | self.input_scale_shift.slots() | self.module_overrides.slots()
        return {slot: sum(tensor.nbytes for tensor in self.extra_tensors(slot)) for slot in slots}

    def set_step(
        self, tokens: Segments, head: Segments = NO_SEGMENTS, *, num_tokens: int = 0, num_head: int = 0
    ) -> None:
        """Set the segments of the next forward: `tokens` over its `num_tokens` rows, `head` over the `num_head`
        sampled rows."""
        steps = ((self.token_plan, tokens, num_tokens), (self.head_plan, head, num_head))
        for plan, segments, num_rows in steps:
            plan.active = bool(segments)
            plan.kernel_plan = self.kernel.plan_segments(segments) if segments else None
            plan.modules = self._modules_of(segments.rows) if segments.rows else None
            plan.scale_shift = self.scale_shift.plan_rows(segments.rows) if segments else None
            plan.input_scale_shift = self.input_scale_shift.plan_rows(segments.rows) if segments else None
            plan.module_overrides = self.module_overrides.plan_rows(segments.rows, num_rows) if segments else None
            if plan.module_overrides is not None:
                assert self.install_hook is not None
                self.module_overrides.hook(plan.module_overrides, self.install_hook)

    def _modules_of(self, rows: Iterable[SlotRows]) -> frozenset[str] | None:
        modules = {self._modules.get(owned.slot) for owned in rows}
        return None if None in modules else _union(frozenset(modules))

    def vocab_size(self, slot: int) -> int | None:
        """Return the vocabulary size of the adapter in `slot` where it differs from the base's, else None."""
        return self._vocab_sizes.get(slot)

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return in_features and out_features by module."""
        return {name: (a.shape[1], b.shape[1]) for name, (a, b) in self.buffers.items()}

    def nbytes(self) -> int:
        """Return the size of all buffers in bytes."""
        return sum(t.numel() * t.element_size() for pair in self.buffers.values() for t in pair)


@lru_cache(maxsize=256)
def _union(sets: frozenset[frozenset[str]]) -> frozenset[str]:
    """Return the union of `sets`: the same object for the same sets, so that layers detect a change by identity."""
    return frozenset().union(*sets)

"""Device tier: the tensors of the resident adapters, and the steps that read them."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from adapters.device.lazy_zeros import zeros
from adapters.kernels.contract import LoRAKernel, split_b
from adapters.kernels.segments import NO_SEGMENTS, Segments
from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.module_overrides import ModuleOverrideTable
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.row_maps import RowMapTable
from adapters.runtime.scale_shift import ScaleShiftTables
from adapters.runtime.step import NO_ADAPTERS, StepPlan, StepPlanner, StepState
from adapters.runtime.virtual_tokens import VirtualTable


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
        self.row_maps = RowMapTable(device)
        self.virtual = VirtualTable(device)
        self.planner = StepPlanner(
            kernel, self.scale_shift, self.input_scale_shift, self.module_overrides, self.row_maps
        )
        self.state = StepState()
        self._vocab_sizes: dict[int, int] = {}  # by slot, where the vocabulary differs from the base's
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

    @property
    def token_plan(self) -> StepPlan:
        """The plan of the step in progress for modules that see all of its rows."""
        return self.state.tokens.plan

    @property
    def head_plan(self) -> StepPlan:
        """The plan of the step in progress for the output head."""
        return self.state.head.plan

    def stacked(self, names: tuple[str, ...]) -> Stack:
        """Return the `add_lora` buffers of a group of siblings of the spec, or of one module."""
        return self._stacks[names]

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Write an adapter into the slot; modules that it does not touch become zero."""
        self.scale_shift.write(slot.index, packed.vectors)
        self.input_scale_shift.write(slot.index, packed.input_vectors)
        self.module_overrides.write(slot.index, packed.module_overrides)
        self.row_maps.write(slot.index, packed.row_maps)
        self.virtual.write(slot.index, packed.virtual)
        self.planner.modules[slot.index] = frozenset(packed.columns.widths)
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
        for table in self._tables():
            table.clear(slot)
        self._vocab_sizes.pop(slot, None)
        self.planner.modules.pop(slot, None)

    def _tables(self) -> tuple[ScaleShiftTables | ModuleOverrideTable | RowMapTable | VirtualTable, ...]:
        return self.scale_shift, self.input_scale_shift, self.module_overrides, self.row_maps, self.virtual

    def extra_tensors(self, slot: int) -> list[torch.Tensor]:
        """Return the tensors that the slot's adapter keeps on the device beside its pages."""
        return [tensor for table in self._tables() for tensor in table.tensors(slot)]

    def extra_bytes(self) -> dict[int, int]:
        """Return the size of what adapters keep beside their pages, by slot; slots without any are absent."""
        slots: set[int] = set().union(*(table.slots() for table in self._tables()))
        return {slot: sum(tensor.nbytes for tensor in self.extra_tensors(slot)) for slot in slots}

    def step(
        self, tokens: Segments, head: Segments = NO_SEGMENTS, *, num_tokens: int = 0, num_head: int = 0
    ) -> AbstractContextManager[None]:
        """Return the context of a step: until it ends, forwards compute with the segments `tokens` over all
        `num_tokens` rows, and with `head` over the `num_head` sampled rows."""
        plan = self.planner.plan_step
        return self.state.during(plan(tokens, num_tokens), plan(head, num_head))

    def recorded_step(self, kernel_plan: Any) -> AbstractContextManager[None]:
        """Return the context of a step whose adapters have only A and B and sample every row, given the kernel's plan;
        without one, of a step without adapters."""
        plan = NO_ADAPTERS if kernel_plan is None else StepPlan(active=True, kernel_plan=kernel_plan)
        return self.state.during(plan, plan)

    def vocab_size(self, slot: int) -> int | None:
        """Return the vocabulary size of the adapter in `slot` where it differs from the base's, else None."""
        return self._vocab_sizes.get(slot)

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return in_features and out_features by module."""
        return {name: (a.shape[1], b.shape[1]) for name, (a, b) in self.buffers.items()}

    def nbytes(self) -> int:
        """Return the size of all buffers in bytes."""
        return sum(t.numel() * t.element_size() for pair in self.buffers.values() for t in pair)

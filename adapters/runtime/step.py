"""The plan of a step's adapters, and the state of the step in progress as the model's modules read it.

Only `StepState.during` writes the state, and what it writes holds until the context of that call ends.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from adapters.kernels.contract import LoRAKernel
from adapters.kernels.segments import Segments, SlotRows
from adapters.runtime.module_overrides import ModuleOverridePlan, ModuleOverrideTable
from adapters.runtime.row_maps import RowMapPlan, RowMapTable
from adapters.runtime.scale_shift import ScaleShiftPlan, ScaleShiftTables


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The adapters of a step for all modules that see the same rows of it. The default is a step without adapters."""

    active: bool = False
    kernel_plan: Any = None  # of the LoRA kernel
    modules: frozenset[str] | None = None  # those with A and B of an adapter of the step; None: any
    scale_shift: ScaleShiftPlan | None = None  # None unless an adapter of the step has output vectors
    input_scale_shift: ScaleShiftPlan | None = None  # the same for input vectors
    module_overrides: ModuleOverridePlan | None = None  # None unless an adapter of the step has overrides
    row_maps: RowMapPlan | None = None  # None unless an adapter of the step has row maps

    def overrides(self, name: str) -> bool:
        """Return True if an adapter of the step overrides the module."""
        return self.module_overrides is not None and self.module_overrides.touches(name)

    def touches(self, names: Iterable[str]) -> bool:
        """Return True if A and B have to be added in any of `names`."""
        return self.active and (self.modules is None or not self.modules.isdisjoint(names))


NO_ADAPTERS = StepPlan()


@dataclass(frozen=True, slots=True)
class StepPlanner:
    """Plans steps from their segments and from what the adapter in each slot has."""

    kernel: LoRAKernel
    scale_shift: ScaleShiftTables
    input_scale_shift: ScaleShiftTables
    module_overrides: ModuleOverrideTable
    row_maps: RowMapTable
    modules: dict[int, frozenset[str]] = field(default_factory=dict)  # by slot, those with A and B

    def plan_step(self, segments: Segments, num_rows: int) -> StepPlan:
        """Return the plan for modules that see `num_rows` rows of the step, to which `segments` refer."""
        if not segments:
            return NO_ADAPTERS
        rows = segments.rows
        return StepPlan(
            True,
            self.kernel.plan_segments(segments),
            self._modules_of(rows) if rows else None,
            self.scale_shift.plan_rows(rows),
            self.input_scale_shift.plan_rows(rows),
            self.module_overrides.plan_rows(rows, num_rows),
            self.row_maps.plan_rows(rows),
        )

    def have_only_lora(self, rows: Iterable[SlotRows]) -> bool:
        """Return True if the adapters of `rows` have nothing but A and B."""
        tables = self.scale_shift, self.input_scale_shift, self.module_overrides, self.row_maps
        return not any(owned.slot in table for table in tables for owned in rows)

    def _modules_of(self, rows: Iterable[SlotRows]) -> frozenset[str] | None:
        modules = {self.modules.get(owned.slot) for owned in rows}
        return None if None in modules else _union(frozenset(modules))


@lru_cache(maxsize=256)
def _union(sets: frozenset[frozenset[str]]) -> frozenset[str]:
    """Return the union of `sets`: the same object for the same sets, so that layers detect a change by identity."""
    return frozenset().union(*sets)


class Current:
    """The plan of the step in progress, `NO_ADAPTERS` between steps. Modules keep this object and read it."""

    __slots__ = ("plan",)

    def __init__(self) -> None:
        self.plan = NO_ADAPTERS


class StepState:
    """The state that all modules of a model share.

    `tokens` is read by modules that see every row of the step, `head` by the output head, which sees only the rows to
    sample. `base_epoch` counts how often modules of the base were replaced, by a merge or its end: code that remembers
    something about the base's weights compares the number.
    """

    def __init__(self) -> None:
        self.tokens, self.head = Current(), Current()
        self.base_epoch = 0
        self._in_progress = False

    @contextmanager
    def during(self, tokens: StepPlan, head: StepPlan) -> Iterator[None]:
        """Make these the plans of the step until the context ends. Steps do not nest."""
        assert not self._in_progress, "another step is in progress"
        self._in_progress, self.tokens.plan, self.head.plan = True, tokens, head
        try:
            yield
        finally:
            self._in_progress, self.tokens.plan, self.head.plan = False, NO_ADAPTERS, NO_ADAPTERS

    def replaced_base(self) -> None:
        """Record, between two steps, that modules of the base were replaced."""
        assert not self._in_progress, "the base is replaced during a step"
        self.base_epoch += 1

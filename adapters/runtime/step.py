"""The state of the step in progress, as the model's modules read it.

Only `StepState.during` writes it, and what it writes holds until the context of that call ends.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from adapters.runtime.module_overrides import ModuleOverridePlan
from adapters.runtime.scale_shift import ScaleShiftPlan


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The adapters of a step for all modules that see the same rows of it. The default is a step without adapters."""

    active: bool = False
    kernel_plan: Any = None  # of the LoRA kernel
    modules: frozenset[str] | None = None  # those with A and B of an adapter of the step; None: any
    scale_shift: ScaleShiftPlan | None = None  # None unless an adapter of the step has output vectors
    input_scale_shift: ScaleShiftPlan | None = None  # the same for input vectors
    module_overrides: ModuleOverridePlan | None = None  # None unless an adapter of the step has overrides

    def is_lora_alone(self) -> bool:
        """Return True if the step's adapters have nothing but A and B."""
        return self.scale_shift is None and self.input_scale_shift is None and self.module_overrides is None

    def touches(self, names: Iterable[str]) -> bool:
        """Return True if A and B have to be added in any of `names`."""
        return self.active and (self.modules is None or not self.modules.isdisjoint(names))


NO_ADAPTERS = StepPlan()


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

"""The per-step part of DoRA, trained biases and IA³: `y ← scale ⊙ y + shift` over the rows of adapters that have
vectors, where `y` is a linear's output or (IA³) its input."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.kernels.segments import SlotRows

# A range of rows reads its slot's vectors by broadcasting. Many short ranges (decode) are gathered instead, which costs
# as much as two ranges on a CPU.
SHORT = 16  # rows of a short range, at most
FEW = 2  # up to this many short ranges are not gathered


@dataclass(frozen=True, slots=True)
class ScaleShiftPlan:
    """`rows[i]` of the step belongs to `slots[i]`, both int64 `[n]`; `ranges` covers all other rows with vectors."""

    rows: Tensor
    slots: Tensor
    ranges: tuple[SlotRows, ...]


class ScaleShiftTables:
    """Per module a table `[slots, 2, channels]` in float32, created when the first adapter needs it.

    Invariant: every table covers every slot that has vectors, with scale 1 and shift 0 where the slot's adapter has
    none for the module. Writes go to slots that no running sequence refers to, so they may happen in another thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[str, Tensor] = {}
        self._slots: set[int] = set()
        self._writing = threading.Lock()

    def write(self, slot: int, vectors: Mapping[str, Tensor]) -> None:
        """Set the vectors of `slot`, `[2, channels]` by module; all other modules get scale 1 and shift 0."""
        with self._writing:
            self._slots.discard(slot)
            if vectors:
                self._slots.add(slot)
                for name in self._tables.keys() | vectors.keys():
                    self._fill(name, slot, vectors.get(name))
            elif not self._slots:
                self._tables.clear()

    def _fill(self, name: str, slot: int, vectors: Tensor | None) -> None:
        table = self._tables.get(name)
        if table is None:
            assert vectors is not None
            table = self._identity(0, vectors.shape[1])
        missing = max(self._slots) + 1 - len(table)
        if missing > 0:
            table = torch.cat([table, self._identity(missing, table.shape[2])])
        table[slot] = self._identity(1, table.shape[2])[0] if vectors is None else vectors
        self._tables[name] = table

    def _identity(self, slots: int, outputs: int) -> Tensor:
        return torch.tensor([[1.0], [0.0]], device=self._device).repeat(slots, 1, outputs)

    def __contains__(self, slot: int) -> bool:
        """Return True if the slot's adapter has vectors."""
        return slot in self._slots

    def plan_rows(self, ranges: Iterable[SlotRows]) -> ScaleShiftPlan | None:
        """Return the plan of a step's rows; None when no adapter of the step has vectors."""
        owned = [r for r in ranges if r.slot in self._slots]
        if not owned:
            return None
        short = [r for r in owned if r.end - r.start <= SHORT]
        gathered = short if len(short) > FEW else []
        pairs = [(row, r.slot) for r in gathered for row in range(r.start, r.end)]
        rows, slots = torch.tensor(pairs, dtype=torch.int64, device=self._device).reshape(-1, 2).T.contiguous()
        return ScaleShiftPlan(rows, slots, tuple(r for r in owned if r not in gathered))

    def applied(self, x: Tensor, name: str, plan: ScaleShiftPlan) -> Tensor:
        """Return `x [..., channels]` with the planned rows changed: a copy, or `x` itself if the module has no
        table."""
        if name not in self._tables:
            return x
        rows = x.reshape(-1, x.shape[-1]).clone()
        self.apply(rows, name, plan)
        return rows.view_as(x)

    def apply(self, y: Tensor, name: str, plan: ScaleShiftPlan) -> None:
        """Change the planned rows of `y [rows, channels]` in place; all other rows are bit-identical."""
        table = self._tables.get(name)
        if table is None:
            return
        if len(plan.rows):
            own = y.index_select(0, plan.rows)
            _scale_shift(own, table.index_select(0, plan.slots))
            y.index_copy_(0, plan.rows, own)
        for r in plan.ranges:
            _scale_shift(y[r.start : r.end], table[r.slot])


def _scale_shift(y: Tensor, vectors: Tensor) -> None:
    """Scale and shift `y` in place: computed in float32 and rounded once."""
    scale, shift = vectors.unbind(-2)
    torch.addcmul(shift, y, scale, out=y)

"""The per-step part of DoRA, trained biases and IA³: `y ← scale ⊙ y + shift` over the rows of adapters that have
vectors, where `y` is a linear's output or (IA³) its input."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.device.transfers import upload
from adapters.kernels.segments import SlotRows

# A range of rows reads its slot's vectors by broadcasting. Many short ranges (decode) are gathered instead, which costs
# as much as two ranges on a CPU.
SHORT = 16  # rows of a short range, at most
FEW = 2  # up to this many short ranges are not gathered


@dataclass(frozen=True, slots=True)
class ScaleShiftPlan:
    """`owned` are the rows of the step that have vectors. `rows[i]` belongs to `slots[owners[i]]`, both int64 `[n]`;
    `ranges` covers all other rows that are owned."""

    owned: tuple[SlotRows, ...]
    rows: Tensor
    owners: Tensor
    slots: tuple[int, ...]
    ranges: tuple[SlotRows, ...]


class ScaleShiftTables:
    """The vectors `[2, channels]` in float32 of the adapters in slots, by slot and module, and nothing else.

    Writes go to slots that no running sequence refers to, so they may happen in another thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[int, dict[str, Tensor]] = {}
        self.version = 0  # counts the changes

    def write(self, slot: int, vectors: Mapping[str, Tensor]) -> None:
        """Set the vectors of `slot`, `[2, channels]` by module; all other modules get scale 1 and shift 0."""
        if vectors:
            own = {name: own.to(self._device, torch.float32).contiguous() for name, own in vectors.items()}
            self._tables[slot] = own
            self.version += 1
        else:
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Release the vectors of `slot`."""
        if self._tables.pop(slot, None) is not None:
            self.version += 1

    def vectors(self, slot: int, name: str) -> Tensor | None:
        """Return the vectors of `slot` for a module, if it has some."""
        return self._tables[slot].get(name)

    def tensors(self, slot: int) -> list[Tensor]:
        """Return the tensors that `slot` holds on the device."""
        return [*self._tables.get(slot, {}).values()]

    def slots(self) -> set[int]:
        """Return the slots that hold vectors."""
        return set(self._tables)

    def __contains__(self, slot: int) -> bool:
        """Return True if the slot's adapter has vectors."""
        return slot in self._tables

    def plan_rows(self, ranges: Iterable[SlotRows]) -> ScaleShiftPlan | None:
        """Return the plan of a step's rows; None when no adapter of the step has vectors."""
        owned = tuple(r for r in ranges if r.slot in self._tables)
        if not owned:
            return None
        short = [r for r in owned if r.end - r.start <= SHORT]
        gathered = short if len(short) > FEW else []
        pairs = [(row, owner) for owner, r in enumerate(gathered) for row in range(r.start, r.end)]
        rows, owners = upload(np.ascontiguousarray(np.array(pairs, dtype=np.int64).reshape(-1, 2).T), self._device)
        slots = tuple(r.slot for r in gathered)
        return ScaleShiftPlan(owned, rows, owners, slots, tuple(r for r in owned if r not in gathered))

    def applied(self, x: Tensor, name: str, plan: ScaleShiftPlan) -> Tensor:
        """Return `x [..., channels]` with the planned rows changed: a copy, or `x` itself if no adapter of the plan has
        vectors for the module."""
        if not any(name in self._tables[slot] for slot in (*plan.slots, *(r.slot for r in plan.ranges))):
            return x
        rows = x.reshape(-1, x.shape[-1]).clone()
        self.apply(rows, name, plan)
        return rows.view_as(x)

    def apply(self, y: Tensor, name: str, plan: ScaleShiftPlan) -> None:
        """Change the planned rows of `y [rows, channels]` in place; all other rows are bit-identical."""
        gathered = [self._tables[slot].get(name) for slot in plan.slots]
        if any(vectors is not None for vectors in gathered):
            own = y.index_select(0, plan.rows)
            stack = torch.stack([_identity(own) if vectors is None else vectors for vectors in gathered])
            is_one_each = len(plan.rows) == len(gathered)  # every range has a row
            _scale_shift(own, stack if is_one_each else stack.index_select(0, plan.owners))
            y.index_copy_(0, plan.rows, own)
        for r in plan.ranges:
            if (vectors := self._tables[r.slot].get(name)) is not None:
                _scale_shift(y[r.start : r.end], vectors)


def _identity(y: Tensor) -> Tensor:
    """Return scale 1 and shift -0.0, which is neutral for -0.0 as well, for the channels of `y`."""
    ones = torch.ones(y.shape[-1], device=y.device)
    return torch.stack([ones, torch.full_like(ones, -0.0)])


def _scale_shift(y: Tensor, vectors: Tensor) -> None:
    """Scale and shift `y` in place: computed in float32 and rounded once."""
    scale, shift = vectors.unbind(-2)
    torch.addcmul(shift, y, scale, out=y)

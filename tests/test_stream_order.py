"""Copies to the device on a stream of their own, while steps run on another: every access is ordered after the ones
before it, at every moment that a step can begin. The checker finds the races that there were."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from adapters.kernels.reference import ReferenceKernel
from adapters.kernels.segments import SlotUse, build_segments
from adapters.model_spec import ModelSpec
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.copies import CudaCopies
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.module_overrides import LowRank
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from adapters.runtime.scale_shift import ScaleShiftTables
from tests.fixtures.stream_order import Order, Race, stream_order

CPU = torch.device("cpu")
SPEC = ModelSpec({"q": (8, 8)}, 16)
COLUMNS = {slot: [(16 * slot, 16 * slot + 16)] for slot in range(4)}


class Setup:
    """A pool whose slot 0 holds an adapter with everything, a step that reads that slot, and the writer of slots."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.pool = AdapterPool(SPEC, 4, torch.float32, CPU, ReferenceKernel())
        self.group = LoRAGroup(["q"], torch.nn.Linear(8, 8).requires_grad_(False), self.pool, self.pool.state.tokens)
        self.copies = CudaCopies(self.pool, CPU)
        self.x = torch.ones(2, 8)

    def load(self, slot: int, *, during_a_step: bool = True) -> None:
        """Load in a reader thread; a step of slot 0 begins after each of its operations."""
        vectors = {"q": torch.ones(2, 8)}
        columns = RankColumns.zeros(16, {"q": (8, 8)}, torch.float32)
        overrides = {"q": (LowRank(torch.ones(1, 8), torch.ones(8, 1)),)}
        packed = PackedAdapter(1, columns, 0, vectors, vectors, overrides)
        self.order.handed("engine", "reader")
        with self.order.thread("reader"):
            self.order.meanwhile = self.step if during_a_step else None
            self.copies.write(Slot(slot, "", [slot]), packed)
            self.order.meanwhile = None
        self.order.handed("reader", "engine")

    def step(self, slot: int = 0) -> None:
        with self.pool.step(build_segments([((SlotUse(slot),), 2)], COLUMNS), num_tokens=2):
            self.group.forward(self.x)


def test_loads_beside_steps_are_in_order() -> None:
    with stream_order() as order, torch.no_grad():
        setup = Setup(order)
        setup.load(0, during_a_step=False)
        setup.step()
        setup.load(1)
        setup.load(2)
        for slot in range(3):
            setup.step(slot)
        setup.load(2)  # the slot's next adapter
        setup.pool.release(1)
        setup.load(1)
        setup.step(1)


class GrowingTables(ScaleShiftTables):
    """One table for all slots, as it was: a larger one takes its place before it is filled."""

    def write(self, slot: int, vectors: Mapping[str, Tensor]) -> None:
        slots = {*self._tables, slot}
        missing = max(slots) + 1 - len(self._table) if hasattr(self, "_table") else max(slots) + 1
        identity = torch.ones(missing, 2, 8)
        self._table: Tensor = torch.cat([self._table, identity]) if hasattr(self, "_table") else identity
        self._tables = {own: {"q": self._table[own]} for own in slots}
        self._table[slot] = vectors["q"]


def test_a_table_that_grows_beside_steps_is_found() -> None:
    with stream_order() as order, torch.no_grad():
        setup = Setup(order)
        setup.pool.scale_shift.__class__ = GrowingTables
        setup.load(0, during_a_step=False)
        setup.step()
        with pytest.raises(Race, match="reads what is still written"):
            setup.load(1)


def test_a_slot_that_is_read_before_its_copy_has_arrived_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fixtures.stream_order.Event.synchronize", lambda _: None)
    with stream_order() as order, torch.no_grad():
        setup = Setup(order)
        setup.load(0, during_a_step=False)
        with pytest.raises(Race, match="reads what is still written"):
            setup.step()


def test_pages_that_are_overwritten_while_a_step_reads_them_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fixtures.stream_order.Stream.wait_stream", lambda *_: None)
    with stream_order() as order, torch.no_grad():
        setup = Setup(order)
        with pytest.raises(Race, match="still"):
            setup.load(0, during_a_step=False)
            setup.step()
            setup.load(0, during_a_step=False)

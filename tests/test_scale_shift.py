"""Scale and shift by slot: every row gets its own adapter's vectors, and all other rows are bit-identical."""

import random

import pytest
import torch

from adapters.kernels.segments import SlotRows, SlotUse, build_segments
from adapters.runtime.scale_shift import ScaleShiftTables

CPU = torch.device("cpu")


def vectors(seed: int, outputs: int = 5) -> torch.Tensor:
    return torch.randn(2, outputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_gets_its_slots_vectors(seed: int, dtype: torch.dtype) -> None:
    chance = random.Random(seed)
    tables = ScaleShiftTables(CPU)
    given = {slot: vectors(slot) for slot in chance.sample(range(8), 4)}
    for slot, pair in given.items():
        tables.write(slot, {"m": pair})
    rows = sorted((chance.randint(-1, 7), chance.choice([1, 1, 1, 3, 40])) for _ in range(12))
    slot_of_row = [slot for slot, count in rows for _ in range(count)]
    y = torch.randn(len(slot_of_row), 5).to(dtype)
    expected = y.clone()
    for row, slot in enumerate(slot_of_row):
        if slot in given:
            expected[row] = (given[slot][1] + y[row].float() * given[slot][0]).to(dtype)
    uses = [((SlotUse(slot),) if slot >= 0 else (), count) for slot, count in rows]
    plan = tables.plan_rows(build_segments(uses, {slot: [(0, 16)] for slot in range(8)}).rows)
    if plan is not None:
        tables.apply(y, "m", plan)
    touched = torch.tensor([slot in given for slot in slot_of_row])
    assert torch.equal(y[~touched], expected[~touched])
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6 if dtype is torch.float32 else 2**-7)


def test_a_module_without_vectors_leaves_the_rows_alone() -> None:
    """The module may have a table of another adapter's vectors, made before or after."""
    tables = ScaleShiftTables(CPU)
    tables.write(0, {"early": vectors(0)})
    tables.write(5, {"late": vectors(1)})
    plan = tables.plan_rows([SlotRows(5, 0, 2), SlotRows(0, 2, 4)])
    assert plan is not None
    for name, changed in (("early", [False, True]), ("late", [True, False]), ("never", [False, False])):
        y = torch.ones(4, 5)
        tables.apply(y, name, plan)
        assert [not torch.equal(y[at : at + 2], torch.ones(2, 5)) for at in (0, 2)] == changed


def test_a_slot_keeps_nothing_of_its_previous_adapter() -> None:
    tables = ScaleShiftTables(CPU)
    tables.write(0, {"a": vectors(0)})
    tables.write(1, {"a": vectors(1)})
    tables.write(0, {"b": vectors(2)})
    y = torch.ones(2, 5)
    plan = tables.plan_rows([SlotRows(0, 0, 2)])
    assert plan is not None
    tables.apply(y, "a", plan)
    assert torch.equal(y, torch.ones(2, 5))
    tables.write(0, {})
    assert tables.plan_rows([SlotRows(0, 0, 2)]) is None
    assert tables.plan_rows([SlotRows(1, 0, 2)]) is not None
    tables.write(1, {})
    assert not tables._tables


def test_a_copy_is_made_only_where_there_are_vectors() -> None:
    tables = ScaleShiftTables(CPU)
    tables.write(1, {"a": vectors(0)})
    plan = tables.plan_rows([SlotRows(1, 2, 4)])
    assert plan is not None
    x = torch.ones(1, 6, 5)
    changed = tables.applied(x, "a", plan)
    assert changed.shape == x.shape and torch.equal(x, torch.ones(1, 6, 5))
    assert [not torch.equal(changed[0, row], x[0, row]) for row in range(6)] == [False, False, True, True, False, False]
    assert tables.applied(x, "b", plan) is x

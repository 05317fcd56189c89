"""The step state of the adapter pool: how long it holds, who writes it, and what happens between two steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels.reference import ReferenceKernel
from adapters.kernels.segments import SlotUse, build_segments
from adapters.model_spec import ModelSpec
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.hooks import ModuleOverrideHooks
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from adapters.runtime.row_maps import RowMaps
from adapters.runtime.step import NO_ADAPTERS
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver

COLUMNS = {0: [(0, 16)], 1: [(16, 32)]}


@pytest.fixture
def pool() -> AdapterPool:
    spec = ModelSpec({"m": (4, 4), "head": (4, 8)}, 16)
    return AdapterPool(spec, 2, torch.float32, torch.device("cpu"), ReferenceKernel())


def one_row(slot: int) -> Any:
    return build_segments([((SlotUse(slot),), 1)], COLUMNS)


def packed(**extras: Any) -> PackedAdapter:
    return PackedAdapter(1, RankColumns.zeros(16, {}, torch.float32), 0, **extras)


def test_a_step_holds_until_its_context_ends(pool: AdapterPool) -> None:
    tokens, head = pool.state.tokens, pool.state.head
    with pool.step(one_row(0), num_tokens=1):
        assert tokens.plan.active and tokens.plan.kernel_plan == one_row(0)
        assert head.plan is NO_ADAPTERS
    assert tokens.plan is head.plan is NO_ADAPTERS


def test_a_step_that_fails_leaves_nothing_behind(pool: AdapterPool) -> None:
    with pytest.raises(RuntimeError, match="device"), pool.step(one_row(0), one_row(0)):
        raise RuntimeError("the device failed")
    assert pool.state.tokens.plan is pool.state.head.plan is NO_ADAPTERS
    with pool.step(one_row(1)):
        assert pool.state.tokens.plan.active


def test_there_is_one_writer_at_a_time(pool: AdapterPool) -> None:
    with pool.step(one_row(0)):
        own = pool.state.tokens.plan
        with pytest.raises(AssertionError, match="another step"), pool.step(one_row(1)):
            pass
        with pytest.raises(AssertionError, match="another step"), pool.recorded_step(None):
            pass
        assert pool.state.tokens.plan is own


def test_the_base_is_replaced_between_two_steps(pool: AdapterPool) -> None:
    group = LoRAGroup(["m"], torch.nn.Linear(4, 4), pool, pool.state.tokens)
    group.replace_base(torch.nn.Linear(4, 4))
    assert pool.state.base_epoch == 1
    with pool.step(one_row(0)), pytest.raises(AssertionError, match="during a step"):
        group.replace_base(torch.nn.Linear(4, 4))


def test_the_pool_knows_which_adapters_have_more_than_a_and_b(pool: AdapterPool) -> None:
    rows = one_row(1).rows
    kinds = {
        "vectors": {"m": torch.ones(2, 4)},
        "input_vectors": {"m": torch.ones(2, 4)},
        "module_overrides": {"m": (torch.nn.Identity(),)},
        "row_maps": {"m": RowMaps(after=torch.nn.Identity())},
    }
    for kind, own in kinds.items():
        pool.write(Slot(1, "", [1]), packed(**{kind: own}))
        assert not pool.planner.have_only_lora(rows) and pool.planner.have_only_lora(one_row(0).rows)
        pool.write(Slot(1, "", [1]), packed())
        assert pool.planner.have_only_lora(rows)


def test_hooks_are_installed_once_for_each_module_that_an_adapter_overrides(pool: AdapterPool) -> None:
    bases = {"m": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 8)}
    hooks = ModuleOverrideHooks(bases, pool, "head")
    hooks.install()
    assert not any(module._forward_hooks for module in bases.values())
    for slot in (0, 1):
        pool.write(Slot(slot, "", [slot]), packed(module_overrides={"m": (torch.nn.Identity(),)}))
        hooks.install()
    assert len(bases["m"]._forward_hooks) == 1 and not bases["head"]._forward_hooks


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path)
    yield made
    made.engine.close()


def test_the_runner_changes_no_module_while_a_step_is_planned(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_progress = []
    register = torch.nn.Module.register_forward_hook
    state = driver.engine._runner.pool.state

    def registered(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        in_progress.append(state._in_progress)
        return register(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", registered)
    folder = write_adapter(tiny_llama(), tmp_path / "own norm", modules_to_save=["input_layernorm"])
    driver.submit("a", [5, 6, 7], driver.add_adapter(folder), max_tokens=3)
    driver.run()
    assert in_progress and not any(in_progress)

"""How much work is done, counted: what a time on a shared machine would not show. Where a bound is no exact number, it
leaves room for another version of transformers, and none for work that grows with what it should not grow with."""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.load import load
from adapters.residency.slots import Slot, pages_of
from adapters.runtime.pack import pack
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.native_forms import form

__all__ = ["form"]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2
SLOTS = 8
BUDGET = 64
# A decoder layer of transformers has 13 modules, each three calls (two of torch's, one of its own); ours adds wrappers,
# attention and the LoRA products. 200 were counted in plain torch; half as many again would be felt on a fast device.
CALLS_PER_LAYER = 300
# A layer that is one call of C++: 15 were counted.
CALLS_PER_WHOLE_LAYER = 30
# Schedule, blocks, batch, segments, sampler, report, and the model around its layers: 450 were counted.
CALLS_PER_STEP = 900
# One more row with its own adapter, in each of those: 94 were counted. Twice that is not yet a call per layer or linear
# of a real model.
CALLS_PER_ROW = 200


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path, adapter_slots=SLOTS, max_batch_tokens=BUDGET)
    made.check = False  # the books are no work of the server's
    yield made
    made.engine.close()


@pytest.fixture
def adapters(driver: Driver, tmp_path: Path) -> list[str]:
    folders = [
        write_adapter(tiny_llama(), tmp_path / str(seed), seed=seed, r=16, target_modules=[*LINEARS, "lm_head"])
        for seed in range(SLOTS)
    ]
    return [driver.add_adapter(folder) for folder in folders]


def test_a_step_gives_every_stream_a_token(driver: Driver) -> None:
    for i in range(4):
        driver.submit(f"{i}", [5 + i] * 12, max_tokens=10)
    driver.run()
    assert [step.stats.batch_tokens for step in driver.steps] == [4 * 12] + [4] * 9
    assert all(len(step.outputs) == 4 for step in driver.steps)


def test_a_long_prompt_takes_full_steps(driver: Driver) -> None:
    driver.submit("long", list(range(3, 93)) * 2, max_tokens=3)
    driver.run()
    assert [step.stats.batch_tokens for step in driver.steps] == [64, 64, 52, 1, 1]


def test_a_prompt_that_was_computed_is_not_computed_again(driver: Driver) -> None:
    for seq_id in ("first", "second"):
        driver.submit(seq_id, list(range(3, 53)), max_tokens=1)
        driver.run()
    assert [step.stats.batch_tokens for step in driver.steps] == [50, 2]  # 48 are three blocks


class Copied(TorchDispatchMode):
    """Bytes that were copied into other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.nbytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [4, 16, 24])
def test_a_load_copies_each_page_once_and_nothing_else(driver: Driver, tmp_path: Path, rank: int) -> None:
    digest = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "one", r=rank, target_modules=LINEARS))
    runner, spec = driver.engine._runner, driver.info.spec
    packed = pack(load(driver.store.path(digest), spec, digest), runner.pool.dtype, runner.bases)
    with Copied() as copied:
        runner.pool.write(Slot(0, digest, list(range(pages_of(rank)))), packed)
    columns = 16 * -(-rank // 16)
    sizes = [sum(size) for name, size in spec.modules.items() if name.endswith(tuple(LINEARS))]
    assert copied.nbytes == columns * sum(sizes) * runner.pool.dtype.itemsize


def decoding(driver: Driver, adapters: list[str | None], prompt_tokens: int = 8) -> None:
    """Streams that are past their prompts, their adapters on the device."""
    for seq_id, max_tokens in (("load", 1), ("stream", 100)):
        for i, digest in enumerate(adapters):
            driver.submit(f"{seq_id}-{i}", [3 + i] * prompt_tokens, digest, max_tokens=max_tokens)
        if seq_id == "load":
            driver.run()
    while driver.step().stats.batch_tokens != len(adapters):
        pass


def calls(step: Callable[[], Any]) -> int:
    """Count the calls of Python functions by this thread."""
    count = 0

    def seen(_: FrameType, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def calls_at_depth(layers: int, folder: Path, dtype: str) -> int:
    """Count the calls of a decode step with one adapter on all linears."""
    deep = tiny_llama(num_hidden_layers=layers)
    copy.deepcopy(deep).to(getattr(torch, dtype)).save_pretrained(folder / "model")
    driver = make_driver(folder / "model", folder, dtype=dtype)
    one = driver.add_adapter(write_adapter(deep, folder / "one", r=16, target_modules=[*LINEARS, "lm_head"]))
    decoding(driver, [one])
    found = calls(driver.engine.step)
    driver.engine.close()
    return found


def calls_per_layer_and_step(folder: Path, dtype: str) -> tuple[float, float]:
    """Those of one decoder layer, and those of a step besides its layers."""
    shallow, deep = (calls_at_depth(layers, folder / str(layers), dtype) for layers in (LAYERS, LAYERS + 4))
    per_layer = (deep - shallow) / 4
    return per_layer, shallow - LAYERS * per_layer


def test_the_python_calls_of_a_step(tmp_path: Path) -> None:
    per_layer, besides = calls_per_layer_and_step(tmp_path, "float32")
    assert per_layer <= CALLS_PER_LAYER and besides <= CALLS_PER_STEP


@pytest.mark.usefixtures("form")
def test_the_python_calls_of_a_step_with_whole_layers(tmp_path: Path) -> None:
    per_layer, besides = calls_per_layer_and_step(tmp_path, "bfloat16")
    assert per_layer <= CALLS_PER_WHOLE_LAYER and besides <= CALLS_PER_STEP


@pytest.mark.parametrize(
    ("targets", "products"),
    [([["q_proj"]], LAYERS), ([["q_proj"], ["down_proj"]], 2 * LAYERS), ([LINEARS], 4 * LAYERS), ([["lm_head"]], 1)],
    ids=str,
)
def test_linears_that_no_adapter_touches_take_no_product(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: list[list[str]], products: int
) -> None:
    folders = [write_adapter(tiny_llama(), tmp_path / str(i), r=4, target_modules=t) for i, t in enumerate(targets)]
    decoding(driver, [driver.add_adapter(folder) for folder in folders])
    kernel, made = driver.engine._runner.pool.kernel, []
    add_lora = type(kernel).add_lora
    monkeypatch.setattr(type(kernel), "add_lora", lambda *given: made.append(add_lora(*given)))
    driver.step()
    assert len(made) == products


def test_a_row_of_another_adapter_adds_few_python_calls(
    driver: Driver, llama_folder: Path, tmp_path: Path, adapters: list[str]
) -> None:
    decoding(driver, [adapters[0]])
    one = calls(driver.engine.step)
    other = make_driver(llama_folder, tmp_path, adapter_slots=SLOTS)
    decoding(other, list(adapters))
    assert calls(other.engine.step) - one <= CALLS_PER_ROW * (SLOTS - 1)
    other.engine.close()


def test_context_adds_no_python_calls(driver: Driver, llama_folder: Path, tmp_path: Path) -> None:
    decoding(driver, [None])
    short = calls(driver.engine.step)
    other = make_driver(llama_folder, tmp_path)
    decoding(other, [None], prompt_tokens=400)
    assert abs(calls(other.engine.step) - short) <= 0.02 * short  # a block more or less
    other.engine.close()


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_a_step_has_one_lora_product_per_group_of_siblings(
    driver: Driver, adapters: list[str], streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding(driver, [None, *adapters[:streams]])
    kernel = driver.engine._runner.pool.kernel
    products = []

    def counted(*args: Any) -> None:
        products.append(args)
        type(kernel).add_lora(kernel, *args)

    monkeypatch.setattr(kernel, "add_lora", counted)
    driver.engine.step()
    assert len(products) == LAYERS * len(("qkv", "o", "gate and up", "down")) + len(("head",))


def test_a_step_of_the_base_has_no_lora_product(
    driver: Driver, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.submit("gone", [3, 4], adapters[0], max_tokens=2)
    driver.run()
    decoding(driver, [None, None])
    monkeypatch.setattr(driver.engine._runner.pool.kernel, "add_lora", lambda *_: pytest.fail("no row has an adapter"))
    driver.engine.step()

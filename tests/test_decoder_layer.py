"""A decoder layer in one call of C++: when it is taken, and that its bits are those of the modules."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, OFTConfig, PeftConfig
from torch import nn

from adapters.runtime.step import StepPlan
from server.ipc.messages import Merge, Submit, Unmerge
from server.model.cpu.decoder_layer import NativeLayer
from server.request import SamplingParams
from tests.fixtures.adapter_factory import tiny_llama, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import Driver, make_driver, plain
from tests.fixtures.native_forms import form

__all__ = ["form"]
LAYERS = 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = {"a": [5] * 3 + [*range(3, 40)], "b": [7, 8, 9], "base": [11, 12, 13, 14], "none": [3]}


@pytest.fixture(params=[{}, {"attention_bias": True, "intermediate_size": 120}], ids=["plain", "biased"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_llama(**request.param)


@pytest.fixture
def driver(form: str, model: nn.Module, tmp_path: Path) -> Iterator[Driver]:
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    made = make_driver(tmp_path / "model", tmp_path, dtype="bfloat16")
    yield made
    made.engine.close()


@pytest.fixture
def wholes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record what `is_whole` returns for each layer of each step."""
    said: list[bool] = []
    own = NativeLayer.is_whole

    def is_whole(layer: NativeLayer) -> bool:
        said.append(own(layer))
        return said[-1]

    monkeypatch.setattr(NativeLayer, "is_whole", is_whole)
    return said


@pytest.fixture
def adapter(driver: Driver, model: nn.Module, tmp_path: Path) -> Callable[..., str]:
    """Write one on all linears of the layers, and put it into the store."""
    seeds = itertools.count()

    def add(**config: Any) -> str:
        seed = next(seeds)
        written = write_adapter(model, tmp_path / f"{seed}", seed=seed, **{"target_modules": LINEARS, **config})
        return driver.add_adapter(written)

    return add


@pytest.fixture
def other_type(driver: Driver, model: nn.Module, tmp_path: Path) -> Callable[[PeftConfig], str]:
    """Write an adapter of another PEFT type, and put it into the store."""
    seeds = itertools.count(100)

    def add(config: PeftConfig) -> str:
        seed = next(seeds)
        return driver.add_adapter(write_peft_adapter(model, tmp_path / f"{seed}", config, seed=seed))

    return add


def answers(driver: Driver, round_: str, digests: Mapping[str, str | None]) -> dict[str, list[object]]:
    """Tokens and log-probabilities of all prompts at once, a step apart; no round finds another's keys and values."""
    for name, digest in digests.items():
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
        driver.engine.handle(Submit(f"{name}-{round_}", PROMPTS[name], params, plain(digest), cache_salt=round_))
        driver.step()
    driver.run()
    return {
        name: [(output.token_ids, output.logprobs) for output in driver.outputs[f"{name}-{round_}"]] for name in digests
    }


def test_the_bits_are_those_of_the_modules(
    driver: Driver, adapter: Callable[..., str], wholes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"a": adapter(r=24), "b": adapter(r=3), "base": None}
    whole = answers(driver, "whole", digests)
    assert wholes and all(wholes)
    monkeypatch.setattr(NativeLayer, "is_whole", lambda _: False)
    assert answers(driver, "modules", digests) == whole


def test_vectors_and_what_is_outside_the_layers_leave_the_bits_as_they_are(
    driver: Driver,
    adapter: Callable[..., str],
    other_type: Callable[..., str],
    wholes: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of all change places from turn to turn, and some are prefilled while others decode."""
    dora, plain_one, outside = (
        adapter(use_dora=True),
        adapter(r=3),
        adapter(modules_to_save=["embed_tokens", "lm_head"]),
    )
    ia3 = other_type(IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]))
    turns = [
        {"a": dora, "b": ia3, "base": None},
        {"a": ia3, "base": dora, "none": plain_one},
        {"a": outside, "b": dora},
    ]
    turns += [{"a": ia3, "b": ia3}, {"a": None, "b": dora}, {"a": plain_one, "base": None}]
    whole = [answers(driver, f"whole {i}", turn) for i, turn in enumerate(turns)]
    assert wholes and all(wholes)
    monkeypatch.setattr(NativeLayer, "is_whole", lambda _: False)
    assert [answers(driver, f"modules {i}", turn) for i, turn in enumerate(turns)] == whole


def test_siblings_with_inputs_of_their_own_go_by_modules(
    driver: Driver, other_type: Callable[..., str], wholes: list[bool]
) -> None:
    digest = other_type(IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]))
    answers(driver, "apart", {"a": digest})
    assert wholes and not any(wholes)


def test_linears_that_no_adapter_touches_are_computed_without_any(
    driver: Driver, adapter: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow, other = adapter(), adapter(target_modules=["q_proj"]), adapter(target_modules=["down_proj"])
    turns = [{"a": narrow}, {"base": None}, {"a": wide}, {"b": narrow}, {"a": narrow, "b": other}, {"none": None}]
    whole = [answers(driver, f"whole {i}", dict(turn)) for i, turn in enumerate(turns)]
    monkeypatch.setattr(NativeLayer, "is_whole", lambda _: False)
    monkeypatch.setattr(StepPlan, "touches", lambda plan, _: plan.active)
    assert [answers(driver, f"modules {i}", dict(turn)) for i, turn in enumerate(turns)] == whole


def test_what_does_more_than_a_and_b_goes_by_modules_for_as_long_as_it_runs(
    driver: Driver, adapter: Callable[..., str], other_type: Callable[..., str], wholes: list[bool]
) -> None:
    oft = OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    others = {"a": other_type(oft), "b": adapter(modules_to_save=["input_layernorm"])}
    before = answers(driver, "before", {"base": None})
    for name, digest in others.items():
        assert all(wholes)
        wholes.clear()
        answers(driver, "during", {name: digest})
        assert wholes and not any(wholes)
        wholes.clear()
    assert answers(driver, "after", {"base": None}) == before
    assert wholes and all(wholes)  # though the overlay's hook stays


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.v_proj", "input_layernorm", "mlp"])
def test_whoever_listens_is_heard(driver: Driver, wholes: list[bool], name: str) -> None:
    runner = driver.engine._runner
    calls: list[object] = []
    name = f"model.layers.1.{name}"
    module = runner.bases[name] if name in runner.bases else runner._model.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    answers(driver, "heard", {"base": None})
    steps = len(driver.steps)
    assert len(calls) == steps and wholes.count(False) == steps and wholes.count(True) == steps * (LAYERS - 1)
    handle.remove()
    wholes.clear()
    answers(driver, "alone", {"none": None})
    assert all(wholes) and len(calls) == steps


def test_merged_weights_take_their_turn(
    driver: Driver, adapter: Callable[..., str], wholes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = adapter(scale=0.3)
    base = answers(driver, "base", {"base": None})
    driver.engine.handle(Merge(1, digest, drain=True))
    driver.run()
    merged = answers(driver, "merged", {"a": digest})
    assert all(wholes)
    driver.engine.handle(Unmerge(2))
    driver.run()
    assert answers(driver, "again", {"base": None}) == base
    assert all(wholes)
    monkeypatch.setattr(NativeLayer, "is_whole", lambda _: False)
    driver.engine.handle(Merge(3, digest, drain=True))
    driver.run()
    assert answers(driver, "modules", {"a": digest}) == merged

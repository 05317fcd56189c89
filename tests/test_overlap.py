"""Steps launched before the tokens of the one before are seen: in which order, and what becomes of sequences that end
meanwhile. That nobody's answer changes is for test_random_traffic.py as well."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from server.engine import engine as engine_module
from server.ipc.messages import Abort
from server.model.sampling.sampler import Started, start_sampling
from tests.fixtures.engine_driver import Driver, make_driver
from tests.test_engine import BLOCK_BYTES, assert_the_cache_is_finite, prompt_of

Make = Callable[..., Driver]


@pytest.fixture
def make(llama_folder: Path, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def new(overlap: bool = True, **settings: Any) -> Driver:
            driver = make_driver(llama_folder, tmp_path / f"data-{overlap}", **settings)
            stack.callback(driver.engine.close)
            driver.engine.overlap = overlap
            return driver

        yield new


@pytest.fixture
def driver(make: Make) -> Driver:
    return make()


# -- the same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_is_preempted_while_its_token_is_on_its_way_goes_on_from_it(make: Make, temperature: float) -> None:
    """Each needs four of six blocks in the end, and they grow together."""
    driver = make(kv_cache_bytes=6 * BLOCK_BYTES)
    asked = {"max_tokens": 40, "temperature": temperature, "seed": 1}
    prompts = {name: prompt_of(20, seed) for seed, name in enumerate(["a", "b", "c"])}
    for name, prompt in prompts.items():
        driver.submit(f"{name} alone", prompt, **asked)
        driver.run()
    assert not driver.engine.scheduler.preemptions
    for name, prompt in prompts.items():
        driver.submit(name, prompt, **asked)
    driver.run()
    assert driver.engine.scheduler.preemptions
    assert all(driver.tokens(name) == driver.tokens(f"{name} alone") for name in prompts)


def test_who_ends_by_length_is_not_computed_once_more(make: Make) -> None:
    rows = []
    for driver in (make(True), make(False)):
        for number in range(4):
            driver.submit(f"s{number}", prompt_of(5 + number), max_tokens=3 + number)
        driver.run()
        rows.append([step.stats.batch_tokens for step in driver.steps if step.stats.batch_tokens])
    assert rows[0] == rows[1]


# -- in which order ----------------------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches and collections, as they happen."""
    seen: list[str] = []

    def observed(*asked: Any) -> Started:
        number = sum(event.startswith("launch") for event in seen)
        seen.append(f"launch {number}")
        started = start_sampling(*asked)
        return Started(started.tokens, lambda: (seen.append(f"collect {number}"), started.collect())[1])

    monkeypatch.setattr(engine_module, "start_sampling", observed)
    return seen


def test_the_next_step_is_launched_before_tokens_are_collected(driver: Driver, events: list[str]) -> None:
    driver.submit("a", prompt_of(5), max_tokens=4)
    driver.submit("b", prompt_of(9), max_tokens=4, temperature=1.0, logprobs=1)
    driver.run()
    assert events == [
        *("launch 0", "launch 1", "collect 0", "launch 2", "collect 1"),
        *("launch 3", "collect 2", "collect 3"),
    ]


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_need_no_tokens_on_the_host(driver: Driver, events: list[str], penalty: str) -> None:
    driver.submit("a", prompt_of(5), max_tokens=3, **{penalty: 1.5})
    driver.run()
    assert events == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"]


def test_a_merge_needs_the_tokens_first(driver: Driver, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weights they are computed with changes between two steps of which none is on its way."""
    monkeypatch.setattr(type(driver.engine.merging), "has_work", lambda _: len(events) < 4)
    driver.submit("a", prompt_of(5), max_tokens=4)
    driver.run()
    while_merging = ["launch 0", "collect 0", "launch 1", "collect 1"]
    assert events == [*while_merging, "launch 2", "launch 3", "collect 2", "collect 3"]


# -- sequences that end while they are on their way --------------------------------------------------------------------


def test_a_stop_is_computed_once_more_and_said_once(driver: Driver, events: list[str]) -> None:
    driver.submit("first", prompt_of(14), max_tokens=6)
    driver.run()
    tokens = driver.tokens("first")
    del events[:]
    driver.submit("again", prompt_of(14), max_tokens=6, stop_token_ids=(tokens[2],))
    driver.run()
    expected = tokens[: tokens.index(tokens[2]) + 1]
    assert driver.tokens("again") == expected and driver.finish_reason("again") == "stop"
    assert len(events) == 2 * (len(expected) + 1)
    assert driver.steps[-1].stats.blocks_used == 0
    assert_the_cache_is_finite(driver)


@pytest.mark.reliability("T40")
def test_an_abort_in_flight(driver: Driver) -> None:
    for name in ("ours", "other"):
        driver.submit(name, prompt_of(9, len(name)), max_tokens=12)
    for _ in range(4):
        driver.step()
    driver.engine.handle(Abort(["ours"]))
    step = driver.step()
    assert ("ours", "abort") in [(output.seq_id, output.finish_reason) for output in step.outputs]
    driver.run()
    assert driver.finish_reason("other") == "length" and len(driver.tokens("other")) == 12
    assert driver.outputs["ours"][-1].finish_reason == "abort"
    assert driver.steps[-1].stats.blocks_used == 0


def test_a_step_that_fails_takes_no_token_of_the_one_before(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.submit("a", prompt_of(5), max_tokens=6)
    driver.step()
    driver.step()
    monkeypatch.setattr(driver.engine._runner, "run", Mock(side_effect=RuntimeError("out of memory")))
    driver.step()
    assert len(driver.tokens("a")) == 2 and driver.finish_reason("a") == "error"
    assert not driver.engine.has_work() and driver.steps[-1].stats.blocks_used == 0


def test_numbers_that_go_bad_are_never_read_again(driver: Driver) -> None:
    """The victim's next step is on its way when its NaN is seen."""
    prompts = {"s0": prompt_of(7), "s1": prompt_of(40, 1), "s2": prompt_of(24, 2)}
    for seq_id, prompt in prompts.items():
        driver.submit(f"clean {seq_id}", prompt)
        driver.run()
    for seq_id, prompt in prompts.items():
        driver.submit(seq_id, prompt)
    driver.step()
    driver.step()
    (victim,) = (seq for seq in driver.engine.scheduler.running if seq.seq_id == "s1")
    driver.engine._runner.kv_cache.keys[0][victim.block_table[-1], 0] = float("nan")
    driver.run()
    assert {seq_id: driver.finish_reason(seq_id) for seq_id in prompts} == {
        "s0": "length",
        "s1": "nonfinite",
        "s2": "length",
    }
    assert_the_cache_is_finite(driver)
    for seq_id in ("s0", "s2"):
        assert driver.tokens(seq_id) == driver.tokens(f"clean {seq_id}")


def test_a_token_that_is_none_is_no_input(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 says on the device that numbers are not finite; the step that follows it looks up some token instead."""
    inputs: list[torch.Tensor] = []
    run = driver.engine._runner.run
    monkeypatch.setattr(
        driver.engine._runner, "run", lambda batch, *rest: (inputs.append(batch.input_ids), run(batch, *rest))[1]
    )
    driver.submit("a", prompt_of(5), max_tokens=6)
    driver.step()
    (seq,) = driver.engine.scheduler.running
    driver.engine._runner.kv_cache.keys[0][seq.block_table[0], 0] = float("nan")
    driver.run()
    assert driver.finish_reason("a") == "nonfinite"
    assert all((ids >= 0).all() for ids in inputs) and len(inputs) == 3

"""Sequences of one prompt: its tokens are computed once, and every output is what it would be alone."""

from pathlib import Path
from typing import Any

import pytest

from server.model.kv_cache import KVCache
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.test_engine import prompt_of


@pytest.fixture(params=[False, True], ids=["one by one", "overlapping"])
def driver(request: pytest.FixtureRequest, llama_folder: Path, tmp_path: Path) -> Any:
    made = make_driver(llama_folder, tmp_path, max_num_seqs=200)
    made.engine.overlap = request.param
    yield made
    made.engine.close()


def computed(driver: Driver, outputs: int, n: int) -> int:
    """Prompt tokens that were computed: all tokens but those that followed an output."""
    return sum(step.stats.batch_tokens for step in driver.steps) - n * (outputs - 1)


def sample(driver: Driver, prompt: list[int], n: int, adapter: str | None = None, outputs: int = 4) -> list[list[int]]:
    driver.steps.clear()
    for i in range(n):
        driver.submit(f"{n}-{i}", prompt, adapter, max_tokens=outputs, temperature=1.0, seed=i)
    driver.run()
    return [driver.tokens(f"{n}-{i}") for i in range(n)]


@pytest.mark.parametrize("length", [17, 40, 48, 49, 200])  # a block has 16 tokens
@pytest.mark.parametrize("n", [2, 16])
def test_every_prompt_is_computed_once(driver: Driver, length: int, n: int) -> None:
    """Each sequence but the first computes one token, the last, whose logits it samples from."""
    prompt = prompt_of(length, seed=n)
    sample(driver, prompt, n)
    assert computed(driver, 4, n) == length + n - 1


def test_128_outputs_of_one_prompt(driver: Driver) -> None:
    sample(driver, prompt_of(100), 128, outputs=2)
    assert computed(driver, 2, 128) == 100 + 127


def test_each_output_is_that_of_its_sequence_alone(driver: Driver, tmp_path: Path) -> None:
    adapter = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "adapter", scale=0.1))
    prompt = prompt_of(45)
    together = sample(driver, prompt, 8, adapter, outputs=12)
    assert len({tuple(tokens) for tokens in together}) > 1
    for i, tokens in enumerate(together):
        driver.submit(f"alone {i}", prompt, adapter, max_tokens=12, temperature=1.0, seed=i)
        driver.run()
        assert driver.tokens(f"alone {i}") == tokens


def test_a_longer_prompt_takes_the_part_that_it_shares(driver: Driver) -> None:
    prompt = prompt_of(40)
    driver.submit("first", prompt, max_tokens=30)
    while not driver.outputs.get("first"):
        driver.step()
    longer = prompt[:37] + prompt_of(6, seed=9)
    driver.submit("longer", longer, max_tokens=6)
    driver.run()
    assert driver.outputs["longer"][0].num_cached_tokens >= 37
    driver.submit("alone", longer, max_tokens=6)
    driver.run()
    assert driver.tokens("longer") == driver.tokens("alone")


@pytest.mark.parametrize("other", ["adapter", "salt"])
def test_nothing_is_shared_across_versions_and_tenants(driver: Driver, tmp_path: Path, other: str) -> None:
    adapter = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "adapter", scale=0.1))
    prompt = prompt_of(40)
    driver.submit("first", prompt, max_tokens=30)
    while not driver.outputs.get("first"):
        driver.step()
    if other == "adapter":
        driver.submit("second", prompt, adapter, max_tokens=2)
    else:
        from tests.test_engine import submit

        submit(driver, "second", prompt, None, "another tenant")
    driver.run()
    assert driver.outputs["second"][0].num_cached_tokens == 0


def test_prompts_that_want_scores_are_computed(driver: Driver) -> None:
    prompt = prompt_of(40)
    for i in range(2):
        driver.submit(f"s{i}", prompt, max_tokens=2, prompt_logprobs=0)
    driver.run()
    first, second = (driver.outputs[f"s{i}"][0].prompt_logprobs for i in range(2))
    assert first == second and first is not None and len(first) == 39


def test_a_block_is_copied_before_its_reader_runs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the copy, outputs differ: the test above would see it."""
    prompt = prompt_of(45)
    right = sample(driver, prompt, 4, outputs=8)
    monkeypatch.setattr(KVCache, "copy", lambda *_: None)
    wrong = sample(driver, prompt_of(45, seed=5), 4, outputs=8)
    monkeypatch.undo()
    for i in range(4):
        driver.outputs.pop(f"4-{i}")
    assert sample(driver, prompt_of(45, seed=5), 4, outputs=8) != wrong
    assert right

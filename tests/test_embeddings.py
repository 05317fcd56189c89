"""Embeddings are the final hidden states of transformers and PEFT, whatever runs in the same steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.request import FinishReason
from tests.fixtures.adapter_factory import tiny_llama, with_peft, write_adapter
from tests.fixtures.adapter_world import PROMPT, AdapterWorld
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.virtual_tokens import generated, write_virtual
from tests.test_architectures import ARCHITECTURES, build

CASES = ("plain", "dora", "saved head and norms", "embedding", "larger vocabulary", "alora")
POOLINGS = ("last", "mean")


class World(AdapterWorld):
    def embed(self, seq_id: str, case: str | None, prompt: list[int], pooling: str) -> None:
        self.submit(seq_id, case, prompt, max_tokens=0, pooling=pooling)

    def reference(self, case: str | None, prompt: list[int], pooling: str) -> torch.Tensor:
        """What PEFT's hidden states come to, with that adapter alone."""
        hidden: torch.Tensor = self.peft_output(case, prompt, output_hidden_states=True).hidden_states[-1][0]
        return hidden[-1] if pooling == "last" else hidden.mean(0)  # after the last norm


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), CASES, max_batch_tokens=16)
    yield made
    made.driver.engine.residency.close()


def embedding(driver: Driver, seq_id: str) -> NDArray[np.float32]:
    """It comes with the only output, which has no tokens."""
    (output,) = driver.outputs[seq_id]
    assert output.finish_reason == FinishReason.LENGTH and not output.token_ids and output.embedding is not None
    return np.frombuffer(output.embedding, np.float32)


def assert_equal(found: NDArray[np.float32], expected: torch.Tensor) -> None:
    assert np.abs(found - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("case", [None, *CASES])
def test_equal_those_of_peft_in_mixed_batches_and_in_chunks(world: World, case: str | None, pooling: str) -> None:
    """The prompts take several steps, beside one that decodes and beside another kind of pooling."""
    world.driver.bring_to_device(*dict.fromkeys(world.digests[name] for name in ("plain", case or "plain")))
    world.driver.outputs.pop("decodes", None)
    world.driver.submit("decodes", PROMPT[:5], world.digests["plain"], max_tokens=12)
    world.driver.step()
    before = len(world.driver.steps)
    other = POOLINGS[pooling == "last"]
    world.embed("embedded", case, PROMPT, pooling)
    world.embed("other", "plain", PROMPT[2:], other)
    world.driver.run()
    assert world.driver.steps[before].stats.batch_tokens == 16  # a part of the prompt, and the one that decodes
    assert_equal(embedding(world.driver, "embedded"), world.reference(case, PROMPT, pooling))
    assert_equal(embedding(world.driver, "other"), world.reference("plain", PROMPT[2:], other))
    assert len(world.driver.tokens("decodes")) == 12


@pytest.mark.parametrize(("pooling", "cached"), [("last", 32), ("mean", 0)])
def test_a_cached_prefix_serves_the_last_token_alone(world: World, pooling: str, cached: int) -> None:
    prompt = [*PROMPT, *PROMPT]
    world.driver.submit("fills the cache", prompt, world.digests["dora"], max_tokens=1)
    world.driver.run()
    world.embed("embedded", "dora", prompt, pooling)
    world.driver.run()
    assert world.driver.outputs["embedded"][0].num_cached_tokens == cached
    assert_equal(embedding(world.driver, "embedded"), world.reference("dora", prompt, pooling))


def test_prompts_of_one_token(world: World) -> None:
    """They look like decode steps."""
    for pooling in POOLINGS:
        world.embed(pooling, "plain", [7], pooling)
    world.driver.run()
    for pooling in POOLINGS:
        assert_equal(embedding(world.driver, pooling), world.reference("plain", [7], "last"))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_preempted_prompt_is_pooled_once(
    world: World, monkeypatch: pytest.MonkeyPatch, pooling: str, overlap: bool
) -> None:
    """It is preempted after each number of steps, with a step in flight where steps overlap. A mean must not take from
    the cache what it computed before."""
    driver, scheduler = world.driver, world.driver.engine.scheduler
    monkeypatch.setattr(driver.engine, "overlap", overlap)
    for steps in range(1, 5):
        prompt = [steps, *PROMPT, *PROMPT, *PROMPT][:70]  # five steps
        world.embed("embedded", "dora", prompt, pooling)
        while (seq := driver.engine._live.by_id["embedded"]).num_computed_tokens < 16 * steps:
            driver.step()
        assert len(driver.engine._in_flight) == overlap
        scheduler.requeue(seq)
        driver.run()
        assert_equal(embedding(driver, "embedded"), world.reference("dora", prompt, pooling))


def test_numbers_that_are_not_finite_end_the_sequence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden state of the prompt is enough, though the logits of the last token are finite: JSON has no NaN."""
    run = world.driver.engine._runner.run

    def poisoned(batch: Any, *args: Any) -> torch.Tensor:
        logits = run(batch, *args)
        if batch.pooled is not None:
            batch.pooled = batch.pooled.clone().fill_(torch.nan)
        return logits

    monkeypatch.setattr(world.driver.engine._runner, "run", poisoned)
    world.embed("bad", None, PROMPT, "mean")
    world.driver.submit("goes on", PROMPT, None, max_tokens=3)
    world.driver.run()
    assert world.driver.finish_reason("bad") == "nonfinite"
    assert len(world.driver.tokens("goes on")) == 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gives_what_its_head_gets(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "model")
    targets = ["q_proj", "v_proj"] if kind == "mixtral" else "all-linear"
    options = {"target_modules": targets, "r": 4, "scale": 0.3, "fan_in_fan_out": kind == "gpt2-conv1d"}
    write_adapter(model, tmp_path / "adapter", **options)
    driver = make_driver(tmp_path / "model", tmp_path, max_batch_tokens=16)
    digest = driver.add_adapter(tmp_path / "adapter")
    for pooling in POOLINGS:
        for name, adapter in (("base", None), ("lora", digest)):
            driver.submit(f"{name} {pooling}", PROMPT, adapter, max_tokens=0, pooling=pooling)
    driver.run()
    for name in ("base", "lora"):
        tuned: Any = model if name == "base" else with_peft(model, tmp_path / "adapter")
        with torch.inference_mode():
            hidden = tuned(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
        assert_equal(embedding(driver, f"{name} last"), hidden[-1])
        assert_equal(embedding(driver, f"{name} mean"), hidden.mean(0))
    driver.engine.residency.close()


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_are_not_pooled(name: str, tmp_path: Path) -> None:
    model = tiny_llama(initializer_range=0.2)
    model.save_pretrained(tmp_path / "model")
    write_virtual(model, tmp_path / "adapter", name, 20)
    driver = make_driver(tmp_path / "model", tmp_path, max_batch_tokens=16)
    digest = driver.add_adapter(tmp_path / "adapter")
    for pooling in POOLINGS:  # the second with the blocks of virtual tokens from the cache
        driver.submit(pooling, PROMPT, digest, max_tokens=0, pooling=pooling)
        driver.run()
    seen: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0]))
    generated(with_peft(model, tmp_path / "adapter"), PROMPT, 1)
    hidden = seen[0][-len(PROMPT) :]
    assert_equal(embedding(driver, "last"), hidden[-1])
    assert_equal(embedding(driver, "mean"), hidden.mean(0))
    driver.engine.residency.close()

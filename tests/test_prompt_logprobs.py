"""Log-probabilities of prompts are those of transformers and PEFT, whatever runs in the same steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.kv_blocks import prompt_scores
from server.ipc.messages import Submit
from server.request import SamplingParams, TokenLogprobs
from tests.fixtures.adapter_world import PROMPT, AdapterWorld
from tests.fixtures.engine_driver import Driver

CASES = ("plain", "dora on lm_head", "saved head and norms", "tokens at both ends", "larger vocabulary", "alora")


class World(AdapterWorld):
    def reference(self, case: str | None, prompt: list[int]) -> torch.Tensor:
        """The log-probabilities `[len(prompt) - 1, vocab]` of PEFT with that adapter alone."""
        logits: torch.Tensor = self.peft_output(case, prompt).logits[0, :-1]
        return logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), CASES, max_batch_tokens=16)
    yield made
    made.driver.engine.residency.close()


def prompt_logprobs(driver: Driver, seq_id: str) -> list[TokenLogprobs]:
    """They come with the first output, and with no other."""
    first, *others = driver.outputs[seq_id]
    assert first.prompt_logprobs is not None and all(output.prompt_logprobs is None for output in others)
    return first.prompt_logprobs


def assert_equal(found: list[TokenLogprobs], prompt: list[int], expected: torch.Tensor, num_top: int) -> None:
    assert len(found) == len(prompt) - 1
    for each, token, row in zip(found, prompt[1:], expected, strict=True):
        assert abs(each.logprob - row[token].item()) < 1e-4
        assert each.rank == int((row > row[token]).sum()) + 1
        assert [token for token, _ in each.top] == row.topk(num_top).indices.tolist()
        assert torch.allclose(torch.tensor([value for _, value in each.top]), row.topk(num_top).values, atol=1e-4)


@pytest.mark.parametrize("case", [None, *CASES])
def test_equal_those_of_peft_in_mixed_batches_and_in_chunks(world: World, case: str | None) -> None:
    """The prompts take several steps, beside one that decodes and one that wants fewer of the most probable tokens."""
    world.submit("decodes", "plain", PROMPT[:5], max_tokens=12)
    world.driver.step()
    world.submit("scored", case, PROMPT, prompt_logprobs=3, max_tokens=2)
    world.submit("other", "plain", PROMPT[2:], prompt_logprobs=0, max_tokens=1)
    world.driver.run()
    assert_equal(prompt_logprobs(world.driver, "scored"), PROMPT, world.reference(case, PROMPT), 3)
    assert_equal(prompt_logprobs(world.driver, "other"), PROMPT[2:], world.reference("plain", PROMPT[2:]), 0)
    assert [len(world.driver.tokens(seq_id)) for seq_id in ("decodes", "scored", "other")] == [12, 2, 1]


def test_a_cached_prefix_is_computed_again(world: World) -> None:
    prompt = PROMPT * 2
    for attempt in ("first", "second"):
        world.submit(attempt, "plain", prompt, prompt_logprobs=1, max_tokens=1)
        world.driver.run()
        assert world.driver.outputs[attempt][-1].num_cached_tokens == 0
    first, second = (prompt_logprobs(world.driver, attempt) for attempt in ("first", "second"))
    assert first == second
    world.submit("plainly", "plain", prompt, max_tokens=1)
    world.driver.run()
    assert world.driver.outputs["plainly"][-1].num_cached_tokens >= 32  # what was scored serves others


def test_no_tokens_may_be_asked_for(world: World) -> None:
    """The prompt alone is computed, beside others that go on; without log-probabilities, too."""
    world.submit("goes on", None, PROMPT, max_tokens=5)
    world.submit("scored", "plain", PROMPT, prompt_logprobs=1, max_tokens=0, logprobs=1)
    world.submit("nothing", None, PROMPT, max_tokens=0)
    world.driver.run()
    for seq_id in ("scored", "nothing"):
        (output,) = world.driver.outputs[seq_id]
        assert (output.token_ids, output.finish_reason, output.logprobs) == ([], "length", None)
    assert_equal(prompt_logprobs(world.driver, "scored"), PROMPT, world.reference("plain", PROMPT), 1)
    assert len(world.driver.tokens("goes on")) == 5


def test_a_prompt_of_one_token_has_none(world: World) -> None:
    world.submit("one", None, [5], prompt_logprobs=2, max_tokens=1)
    world.driver.run()
    (output,) = world.driver.outputs["one"]
    assert not output.prompt_logprobs and len(output.token_ids) == 1


def test_a_preempted_prompt_loses_none(tmp_path: Path) -> None:
    """Two sequences grow until the cache is full: one is preempted, and computed again after its prompt was scored or
    in the middle of it."""
    world = World(tmp_path, CASES, kv_cache_bytes=40 << 10, max_batch_tokens=16, adapter_slots=2)
    driver = world.driver
    room = driver.info.num_blocks * driver.info.block_size
    prompt = (PROMPT * 30)[: room // 2 - 8]
    for seq_id in ("a", "b"):
        world.submit(seq_id, None, prompt, prompt_logprobs=1, max_tokens=24)
    driver.run()
    assert driver.engine.scheduler.preemptions
    expected = world.reference(None, prompt)
    for seq_id in ("a", "b"):
        assert_equal(prompt_logprobs(driver, seq_id), prompt, expected, 1)
        assert len(driver.tokens(seq_id)) == 24
    driver.engine.residency.close()


def test_the_rows_of_logits_of_a_step_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "LEAST_ROWS", 7)
    monkeypatch.setattr(prompt_scores, "ROWS_PER_SEQUENCE", 0)
    world.submit("scored", "plain", PROMPT, prompt_logprobs=2, max_tokens=1)
    before = len(world.driver.steps)
    world.driver.run()
    assert max(step.stats.batch_tokens for step in world.driver.steps[before:]) <= 7 + 1
    assert_equal(prompt_logprobs(world.driver, "scored"), PROMPT, world.reference("plain", PROMPT), 2)


def test_numbers_that_are_not_finite_end_the_sequence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the prompt alone is enough: JSON has no NaN."""
    run = world.driver.engine._runner.run

    def poisoned(*args: Any) -> torch.Tensor:
        logits = run(*args).clone()
        if len(logits) > 1:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(world.driver.engine._runner, "run", poisoned)
    world.submit("bad", None, PROMPT, prompt_logprobs=1, max_tokens=3)
    world.driver.run()
    assert world.driver.finish_reason("bad") == "nonfinite"


def test_requests_share_cached_prefixes_only_within_a_salt(world: World) -> None:
    prompt = [40, 41, *PROMPT, *PROMPT]
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    hits = []
    for number, salt in enumerate(("", "x", "x", "y", "")):
        world.driver.engine.handle(Submit(f"salt{number}", prompt, params, request_salt=salt))
        world.driver.run()
        hits.append(world.driver.outputs[f"salt{number}"][-1].num_cached_tokens > 0)
    assert hits == [False, False, True, False, True]

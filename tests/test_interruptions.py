"""Sequences that switch to another version, end early or wait through a pause, between two steps of a real engine."""

from pathlib import Path
from typing import Any

import pytest

from server.ipc.messages import Abort, Pause, ResetPrefixCache, Resume, SwitchAdapter
from server.request import ScaledAdapter
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver, plain
from tests.fixtures.timing import patience

PROMPT = [*range(3, 43)]


@pytest.fixture(params=[False, True], ids=["one by one", "overlapping"])
def driver(request: pytest.FixtureRequest, llama_folder: Path, tmp_path: Path) -> Any:
    made = make_driver(llama_folder, tmp_path)
    made.engine.overlap = request.param
    yield made
    made.engine.close()


@pytest.fixture
def versions(driver: Driver, tmp_path: Path) -> list[str]:
    folders = [write_adapter(tiny_llama(), tmp_path / f"v{i}", seed=i, scale=0.1) for i in range(3)]
    digests = [driver.add_adapter(folder) for folder in folders]
    driver.bring_to_device(*digests)
    return digests


def run_until(driver: Driver, seq_id: str, tokens: int) -> None:
    for _ in patience("the tokens"):
        if len(driver.outputs.get(seq_id, [])) >= tokens:
            return
        driver.step()


def ask(driver: Driver, request: Any) -> None:
    """Step until the request has its reply."""
    driver.engine.handle(request)
    for _ in patience("the reply"):
        if request.request_id in driver.replies:
            break
        driver.step()
    assert driver.replies[request.request_id].error is None


def fresh(driver: Driver, prompt: list[int], adapter: Any, tokens: int, **sampling: Any) -> list[int]:
    driver.submit("fresh", prompt, adapter, max_tokens=tokens, **sampling)
    driver.run()
    return driver.tokens("fresh")


def label_of(driver: Driver, seq_id: str) -> list[tuple[ScaledAdapter, ...] | None]:
    return [output.adapters for output in driver.outputs[seq_id]]


def test_from_a_switch_on_the_output_is_that_of_a_fresh_run(driver: Driver, versions: list[str]) -> None:
    """The old version's tokens stay and are the prompt of what follows; each token has its version."""
    old, new, _ = versions
    alone = fresh(driver, PROMPT, old, 24)
    driver.submit("a", PROMPT, old, max_tokens=24)
    run_until(driver, "a", 5)
    ask(driver, SwitchAdapter(1, ["a", "gone"], old, new))
    driver.run()
    labels = label_of(driver, "a")
    switched = next(i for i, adapters in enumerate(labels) if adapters is not None)
    assert 5 <= switched < 24 and labels[switched] == plain(new) and set(labels[switched + 1 :]) == {None}
    tokens = driver.tokens("a")
    assert tokens[:switched] == alone[:switched]
    del driver.outputs["fresh"]
    assert tokens[switched:] == fresh(driver, PROMPT + tokens[:switched], new, 24 - switched) != alone[switched:]


def test_a_switch_before_the_first_token_gives_the_new_version_alone(driver: Driver, versions: list[str]) -> None:
    old, new, _ = versions
    driver.submit("a", PROMPT, old, max_tokens=6, prompt_logprobs=1)
    driver.engine.handle(SwitchAdapter(1, ["a"], old, new))
    driver.run()
    driver.submit("b", PROMPT, new, max_tokens=6, prompt_logprobs=1)
    driver.run()
    assert driver.tokens("a") == driver.tokens("b")
    assert driver.outputs["a"][0].prompt_logprobs == driver.outputs["b"][0].prompt_logprobs


def test_others_and_the_scale_of_a_composition_stay(driver: Driver, versions: list[str]) -> None:
    old, new, other = versions
    before = tuple(sorted([ScaledAdapter(old, 0.5), ScaledAdapter(other)]))
    after = tuple(sorted([ScaledAdapter(new, 0.5), ScaledAdapter(other)]))
    alone = fresh(driver, PROMPT, old, 16)
    driver.submit("both", PROMPT, before, max_tokens=16)
    driver.submit("apart", PROMPT, old, max_tokens=16)
    run_until(driver, "both", 3)
    ask(driver, SwitchAdapter(1, ["both"], old, new))
    driver.run()
    switched = next(i for i, adapters in enumerate(label_of(driver, "both")) if adapters is not None)
    tokens = driver.tokens("both")
    assert label_of(driver, "both")[switched] == after and driver.tokens("apart") == alone
    del driver.outputs["fresh"]
    assert tokens[switched:] == fresh(driver, PROMPT + tokens[:switched], after, 16 - switched)


def test_a_switched_sequence_shares_no_block_with_its_old_version(driver: Driver, versions: list[str]) -> None:
    old, new, _ = versions
    driver.submit("a", PROMPT, old, max_tokens=40)
    run_until(driver, "a", 20)
    ask(driver, SwitchAdapter(1, ["a"], old, new))
    driver.run()
    text = PROMPT + driver.tokens("a")[:30]
    for adapter in (old, new):
        driver.submit(f"later {adapter}", text, adapter, max_tokens=4)
        driver.run()
        one, two = driver.tokens(f"later {adapter}"), fresh_without_cache(driver, text, adapter)
        assert one == two


def fresh_without_cache(driver: Driver, prompt: list[int], adapter: str) -> list[int]:
    ask(driver, ResetPrefixCache(len(driver.replies) + 5000))
    driver.outputs.pop("fresh", None)
    return fresh(driver, prompt, adapter, 4)


def test_a_stopped_sequence_keeps_its_output(driver: Driver, versions: list[str]) -> None:
    alone = fresh(driver, PROMPT, versions[0], 24)
    driver.submit("a", PROMPT, versions[0], max_tokens=24)
    run_until(driver, "a", 4)
    driver.engine.handle(Abort(["a"], keep_output=True))
    driver.run()
    tokens = driver.tokens("a")
    assert driver.finish_reason("a") == "stopped" and 4 <= len(tokens) < 24 and tokens == alone[: len(tokens)]


@pytest.mark.parametrize("numbers", [{"prompt_logprobs": 1}, {"pooling": "last", "max_tokens": 0}])
def test_without_the_numbers_of_its_prompt_there_is_no_output(driver: Driver, numbers: dict[str, Any]) -> None:
    driver.submit("a", PROMPT, **numbers)
    driver.engine.handle(Abort(["a"], keep_output=True))
    driver.run()
    assert driver.finish_reason("a") == "abort"


def test_a_pause_keeps_sequences_and_lets_none_take_part(driver: Driver, versions: list[str]) -> None:
    old, new, _ = versions
    alone = fresh(driver, PROMPT, old, 24)
    driver.submit("a", PROMPT, old, max_tokens=24)
    run_until(driver, "a", 4)
    ask(driver, Pause(1, "keep"))
    driver.submit("later", PROMPT, new, max_tokens=4)
    said = len(driver.outputs["a"])
    for _ in range(5):
        assert driver.step().stats.batch_tokens == 0
    assert len(driver.outputs["a"]) == said and "later" not in driver.outputs
    ask(driver, Resume(2))
    driver.run()
    assert driver.tokens("a") == alone and len(driver.tokens("later")) == 4


def test_a_sequence_may_switch_in_a_pause(driver: Driver, versions: list[str]) -> None:
    old, new, _ = versions
    driver.submit("a", PROMPT, old, max_tokens=24)
    run_until(driver, "a", 4)
    ask(driver, Pause(1, "keep"))
    said = driver.tokens("a")
    ask(driver, SwitchAdapter(2, ["a"], old, new))
    ask(driver, Resume(3))
    driver.run()
    tokens = driver.tokens("a")
    assert tokens[: len(said)] == said and tokens[len(said) :] == fresh(driver, PROMPT + said, new, 24 - len(said))


def test_a_waiting_pause_lets_sequences_end_and_holds_later_ones(driver: Driver, versions: list[str]) -> None:
    driver.submit("a", PROMPT, versions[0], max_tokens=12)
    run_until(driver, "a", 2)
    driver.engine.handle(Pause(1, "wait"))
    driver.submit("later", PROMPT, versions[1], max_tokens=4)
    for _ in patience("the pause"):
        if 1 in driver.replies:
            break
        driver.step()
    assert driver.finish_reason("a") == "length" and len(driver.tokens("a")) == 12 and "later" not in driver.outputs
    ask(driver, Resume(2))
    driver.run()
    assert len(driver.tokens("later")) == 4


def test_a_pause_that_ends_sequences_keeps_their_outputs(driver: Driver) -> None:
    driver.submit("a", PROMPT, max_tokens=24)
    run_until(driver, "a", 2)
    ask(driver, Pause(1, "abort"))
    assert driver.finish_reason("a") == "stopped" and len(driver.tokens("a")) >= 2


def test_a_resume_ends_a_pause_that_still_waits(driver: Driver) -> None:
    driver.submit("a", PROMPT, max_tokens=24)
    run_until(driver, "a", 2)
    driver.engine.handle(Pause(1, "wait"))
    ask(driver, Resume(2))
    error = driver.replies[1].error
    assert error is not None and error[0] == "busy"
    driver.submit("later", PROMPT, max_tokens=4)
    driver.run()
    assert len(driver.tokens("a")) == 24 and len(driver.tokens("later")) == 4


def test_a_reset_forgets_prefixes_and_changes_no_output(driver: Driver) -> None:
    first = fresh(driver, PROMPT, None, 20)
    driver.submit("a", PROMPT, max_tokens=20)
    run_until(driver, "a", 18)  # its own blocks, some of them full
    assert driver.outputs["a"][0].num_cached_tokens > 0
    ask(driver, ResetPrefixCache(1))
    driver.run()
    driver.submit("b", PROMPT, max_tokens=20)
    driver.run()
    assert driver.outputs["b"][0].num_cached_tokens == 0
    assert driver.tokens("a") == driver.tokens("b") == first

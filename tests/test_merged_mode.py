"""The engine in merged mode: streams run on across the switch, others wait, and the base comes back bit for bit."""

from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from server.ipc.messages import Merge, RetireAdapter, StepOutputs, Unmerge
from tests.fixtures.adapter_factory import tiny_llama, with_peft, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.timing import HANG_SECONDS, Clock, patience
from tests.test_architectures import greedy
from tests.test_merge import weights_digest

PROMPTS = [[5, 17, 42, 9, 88, 3], [7, 7, 21]]
NEW_TOKENS = 60


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    config: dict[str, Any] = {"target_modules": "all-linear", "scale": 0.2}
    return {name: write_adapter(tiny_llama(), root / name, seed=i, **config) for i, name in enumerate(("own", "other"))}


@pytest.fixture(scope="module")
def answers(adapters: dict[str, Path]) -> dict[tuple[str, int], list[int]]:
    """Compute the outputs of PEFT alone, by adapter and prompt."""
    models = {name: with_peft(tiny_llama(), folder) for name, folder in adapters.items()} | {"base": tiny_llama()}
    return {
        (name, i): greedy(model, prompt, NEW_TOKENS)
        for name, model in models.items()
        for i, prompt in enumerate(PROMPTS)
    }


class Served:
    """An engine, the two adapters in its store, and what it said of merging."""

    def __init__(self, driver: Driver, adapters: dict[str, Path]):
        self.driver = driver
        digests = {name: driver.add_adapter(path) for name, path in adapters.items()}
        driver.bring_to_device(*digests.values())  # so that sequences submitted together start together
        self.digests: dict[str, str | None] = digests | {"base": None}
        self.model = driver.engine._runner._model

    def submit(self, seq_id: str, name: str, prompt: int = 0, max_tokens: int = NEW_TOKENS) -> None:
        self.driver.submit(seq_id, PROMPTS[prompt], self.digests[name], max_tokens=max_tokens)

    def ask(self, request_id: int, name: str = "own", **options: bool) -> None:
        digest = self.digests[name]
        assert digest is not None
        self.driver.engine.handle(Merge(request_id, digest, **options))

    @property
    def state(self) -> str:
        return self.driver.engine.merging.status.state

    def step_until(self, condition: Any) -> None:
        """Streams go on while a thread computes the merged weights, but not far, however slow that thread is."""
        for number, _ in enumerate(patience("the next state")):
            if condition():
                return
            self.driver.step()
            prepared = self.driver.engine.merging._future
            if number >= 5 and prepared is not None:
                wait([prepared], HANG_SECONDS)

    def settled(self, request_id: int) -> str | None:
        self.step_until(lambda: request_id in self.driver.replies)
        error = self.driver.replies[request_id].error
        return None if error is None else error[0]

    def switches(self) -> list[tuple[str, str]]:
        return [(s.direction, s.reason) for step in self.driver.steps for s in step.switches]


@pytest.fixture
def serve(llama_folder: Path, tmp_path: Path, adapters: dict[str, Path]) -> Iterator[Any]:
    drivers: list[Driver] = []

    def served(**settings: Any) -> Served:
        drivers.append(make_driver(llama_folder, tmp_path, **settings))
        return Served(drivers[-1], adapters)

    yield served
    for driver in drivers:
        driver.engine.residency.close()


def test_streams_that_run_across_both_switches_say_what_peft_says(serve: Any, answers: Any) -> None:
    served: Served = serve()
    before = weights_digest(served.model)
    for i in range(2):
        served.submit(f"s{i}", "own", i)
    served.step_until(lambda: len(served.driver.outputs.get("s1", [])) > 5)
    assert served.driver.steps[-1].stats.batch_adapters == 1
    served.ask(1)
    assert served.settled(1) is None and served.state == "merged"
    assert weights_digest(served.model) != before
    step = served.driver.step()
    assert step.stats.batch_tokens == 2 and step.stats.batch_adapters == 0  # base rows
    served.submit("late", "own", 1)
    for _ in range(5):
        served.driver.step()
    served.driver.engine.handle(Unmerge(2))
    assert served.settled(2) is None and served.state == "none"
    assert len(served.driver.outputs["s0"]) < NEW_TOKENS, "the switch came too late to be seen"
    assert served.driver.step().stats.batch_adapters == 1
    assert weights_digest(served.model) == before
    served.driver.run()
    got = {name: served.driver.tokens(name) for name in ("s0", "s1", "late")}
    assert got == {"s0": answers["own", 0], "s1": answers["own", 1], "late": answers["own", 1]}
    assert served.switches() == [("merge", "request"), ("unmerge", "request")]


def test_others_in_flight_refuse_a_merge_that_may_not_drain_them(serve: Any) -> None:
    served: Served = serve()
    served.submit("other", "other")
    served.ask(1)
    assert served.settled(1) == "busy" and served.state == "none"
    served.driver.run()
    assert served.driver.finish_reason("other") == "length"


def test_others_that_run_may_finish_and_later_ones_wait_and_end_the_merge(serve: Any, answers: Any) -> None:
    served: Served = serve()
    served.submit("before", "other", max_tokens=NEW_TOKENS)
    served.submit("own", "own")
    served.step_until(lambda: {"before", "own"} <= served.driver.outputs.keys())
    served.ask(1, drain=True)
    served.step_until(lambda: served.state == "waiting")
    assert "before" in {seq.seq_id for seq in served.driver.engine.scheduler.running}
    served.submit("after", "base", 1)
    served.submit("own, after", "own", 1)
    assert served.settled(1) is None
    assert served.driver.finish_reason("before") == "length" and "after" not in served.driver.outputs
    served.driver.run()
    assert served.switches() == [("merge", "request"), ("unmerge", "others")]
    expected = {"before": ("other", 0), "own": ("own", 0), "after": ("base", 1), "own, after": ("own", 1)}
    assert {name: served.driver.tokens(name) for name in expected} == {k: answers[v] for k, v in expected.items()}


def test_where_others_are_refused_what_came_before_the_merge_is_still_answered(serve: Any, answers: Any) -> None:
    served: Served = serve(merge_others="refuse", max_num_seqs=1)
    served.submit("runs", "base")
    served.driver.step()
    served.submit("waits", "other", 1, max_tokens=3)
    served.ask(1, drain=True)
    assert served.settled(1) is None and served.state == "merged"
    assert served.driver.tokens("waits") == answers["other", 1][:3]
    served.submit("own", "own")
    served.driver.run()
    assert served.state == "merged" and served.driver.tokens("own") == answers["own", 0]


def test_where_others_are_refused_who_comes_after_the_merge_is_answered(serve: Any, answers: Any) -> None:
    """Submitted after the merge, though the API let it pass before; also in one batch of messages with it."""
    served = serve(merge_others="refuse", max_wait_steps=2)
    served.ask(1)
    assert served.settled(1) is None
    served.submit("late", "base")
    for number in range(5):
        served.submit(f"own{number}", "own", max_tokens=3)
    served.driver.run()
    assert served.driver.finish_reason("late") == "merged"
    assert len(served.driver.outputs["late"]) == 1
    for number in range(5):
        assert served.driver.tokens(f"own{number}") == answers["own", 0][:3]


def test_a_version_that_no_name_points_at_any_more_is_unmerged(serve: Any, answers: Any) -> None:
    served: Served = serve()
    before = weights_digest(served.model)
    served.ask(1)
    assert served.settled(1) is None
    served.submit("own", "own")
    served.driver.step()
    digest = served.digests["own"]
    assert digest is not None
    served.driver.engine.handle(RetireAdapter(digest))
    served.driver.run()
    assert served.driver.tokens("own") == answers["own", 0]
    assert served.switches() == [("merge", "request"), ("unmerge", "retired")]
    assert weights_digest(served.model) == before and served.driver.engine.residency.where(digest) == "disk"


def test_a_merge_can_be_given_up_before_it_happens(serve: Any) -> None:
    served: Served = serve()
    served.submit("other", "other")
    served.ask(1, drain=True)
    served.step_until(lambda: served.state == "waiting")
    served.driver.engine.handle(Unmerge(2))
    assert (served.settled(1), served.settled(2)) == ("busy", None)
    assert served.switches() == [] and served.state == "none"
    served.submit("base", "base")
    served.driver.run()
    assert served.driver.finish_reason("base") == "length"


def test_a_version_that_cannot_be_read_leaves_everything_as_it_was(serve: Any) -> None:
    served: Served = serve()
    before = weights_digest(served.model)
    served.driver.engine.handle(Merge(1, "f" * 64))
    assert served.settled(1) == "invalid" and served.state == "none"
    assert weights_digest(served.model) == before


def test_a_version_that_changes_more_than_linears_is_refused(serve: Any, tmp_path: Path) -> None:
    served: Served = serve()
    saved = write_adapter(tiny_llama(), tmp_path / "saved", modules_to_save=["norm"])
    served.driver.engine.handle(Merge(1, served.driver.add_adapter(saved), drain=True))
    assert served.settled(1) == "not_mergeable" and served.state == "none"


def test_by_policy_one_owner_s_adapter_is_merged_and_gives_way_to_others(serve: Any, answers: Any) -> None:
    served: Served = serve(
        merge_policy="auto", merge_others="refuse", merge_window=0.2, merge_min_requests=2, merge_cooldown=1000
    )

    clock = served.driver.engine.merging.policy._clock = Clock()

    def merged_after_one_more() -> bool:
        clock.now += 0.05
        served.submit(f"own {len(served.driver.steps)}", "own", max_tokens=2)
        return served.state == "merged"

    served.step_until(merged_after_one_more)
    served.submit("own", "own")
    served.submit("base", "base")
    served.driver.run()
    assert served.driver.tokens("own") == answers["own", 0] and served.driver.tokens("base") == answers["base", 0]
    assert served.switches() == [("merge", "policy"), ("unmerge", "others")]


def test_a_full_cache_preempts_in_merged_mode_too(serve: Any, answers: Any) -> None:
    served: Served = serve(kv_cache_bytes=8 * 2 * 2 * 2 * 16 * 4 * 16, max_model_len=80)
    served.ask(1)
    assert served.settled(1) is None
    for i in range(4):
        served.submit(f"s{i}", "own", i % 2)
    served.driver.run()
    assert served.driver.engine.scheduler.preemptions > 0
    assert all(served.driver.tokens(f"s{i}") == answers["own", i % 2] for i in range(4))


def test_an_idle_engine_says_that_it_is_merged_and_rests(serve: Any) -> None:
    served: Served = serve()
    served.ask(1)
    assert served.settled(1) is None
    assert not served.driver.engine.has_work()
    said: list[StepOutputs] = [step for step in served.driver.steps if step.merge is not None]
    assert [step.merge.state for step in said if step.merge] == ["preparing", "merged"]


def test_keys_and_values_of_merged_weights_are_not_used_by_others(serve: Any) -> None:
    """The same prompt before, during and after a merge: the third has the bits of the first, and so has a stream that
    ran across both switches for as long as it was not merged."""
    served: Served = serve()
    driver, own, prompt = served.driver, served.digests["own"], [(7 * i) % 90 + 3 for i in range(40)]

    def ask(seq_id: str) -> tuple[list[float], int]:
        driver.submit(seq_id, prompt, own, max_tokens=4, logprobs=1)
        driver.run()
        outputs = driver.outputs[seq_id]
        return [scores.logprob for output in outputs for scores in output.logprobs or []], outputs[-1].num_cached_tokens

    first, _ = ask("before")
    driver.submit("across", [*prompt, 5], own, max_tokens=NEW_TOKENS)
    driver.step()
    served.ask(1)
    assert served.settled(1) is None
    assert ask("merged")[1] == 0 and ask("merged again")[1] == 32
    driver.engine.handle(Unmerge(2))
    assert served.settled(2) is None
    driver.run()
    assert ask("after") == (first, 32)

"""Schedules: the same seed draws the same, and what is drawn has the distribution that was asked for."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from load_tests.scenarios import (
    Bounds,
    Closed,
    Fixed,
    Gamma,
    Lognormal,
    Models,
    OnOff,
    Poisson,
    ScenarioError,
    Trace,
    Uniform,
)
from load_tests.schedule import Planned, arrival_times, build, model_classes, token_counts
from tests.fixtures.load_run import scenario

ADAPTERS = [f"adapter-{index}" for index in range(8)]
MANY = 20_000


def schedule(seed: int = 0, **changes: Any) -> list[Planned]:
    return build(scenario(**changes), "base", ADAPTERS, seed)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_a_seed_is_a_schedule() -> None:
    assert schedule(seed=1) == schedule(seed=1) != schedule(seed=2)


def test_other_lengths_leave_arrivals_and_models_as_they_were() -> None:
    short, long = schedule(output_tokens=Fixed(1)), schedule(prompt_tokens=Uniform(50, 90), output_tokens=Fixed(99))
    assert [(p.offset_s, p.model) for p in short] == [(p.offset_s, p.model) for p in long]


@pytest.mark.parametrize("arrivals", [Poisson(50.0), Gamma(50.0, 3.0)])
def test_arrivals_have_their_rate_and_variation(arrivals: Poisson | Gamma) -> None:
    gaps = np.diff(arrival_times(arrivals, np.inf, MANY, rng()), prepend=0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(arrivals.cv if isinstance(arrivals, Gamma) else 1.0, rel=0.05)


def test_on_and_off_periods() -> None:
    times = arrival_times(OnOff(rate=50.0, on_s=2.0, off_s=3.0), np.inf, MANY, rng())
    assert (np.diff(times) >= 0).all()
    assert (times % 5 <= 2).all()
    assert len(times) / times[-1] == pytest.approx(50 * 2 / 5, rel=0.05)


def test_arrivals_are_bounded_in_time_and_number() -> None:
    assert arrival_times(Poisson(100.0), 3.0, MANY, rng()).max() < 3
    assert len(schedule(bounds=Bounds(duration_s=1e6, max_requests=17))) == 17
    until_s = max(p.offset_s for p in schedule(bounds=Bounds(warm_up_s=5.0, duration_s=10.0)))
    assert 10 < until_s < 15


def test_a_closed_loop_has_as_many_as_it_may_send() -> None:
    planned = schedule(arrivals=Closed(2), bounds=Bounds(duration_s=1.0, max_requests=9))
    assert [p.offset_s for p in planned] == [0.0] * 9


def test_zipf_and_the_base_s_share() -> None:
    models = Models(adapters="zipf", exponent=1.2, base_share=0.25)
    planned = schedule(models=models, arrivals=Poisson(1000.0), bounds=Bounds(duration_s=1e6, max_requests=MANY))
    counts = Counter(p.model for p in planned)
    weights = np.arange(1, 9) ** -1.2
    expected = [0.25, *(0.75 * weights / weights.sum())]
    assert [counts[name] / MANY for name in ("base", *ADAPTERS)] == pytest.approx(expected, abs=0.015)


def test_head_and_tail() -> None:
    weights = {"base": 9.0, "often": 4.0, "sometimes": 3.0, "seldom": 2.0, "never": 0.0}
    classes = {"base": "base", "often": "head", "sometimes": "head", "seldom": "tail", "never": "tail"}
    assert model_classes(weights, "base") == classes
    assert model_classes({"base": 0.5, "a": 0.25, "b": 0.25}, "base") == {
        "base": "base",
        "a": "adapter",
        "b": "adapter",
    }


def test_lengths() -> None:
    assert set(token_counts(Fixed(7), 5, rng())) == {7}
    uniform = token_counts(Uniform(3, 5), MANY, rng())
    assert set(uniform) == {3, 4, 5} and uniform.mean() == pytest.approx(4, rel=0.02)
    lognormal = token_counts(Lognormal(median=100.0, sigma=0.5, low=20, high=400), MANY, rng())
    assert lognormal.min() >= 20 and lognormal.max() <= 400
    assert np.median(lognormal) == pytest.approx(100, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.05)


def test_a_prompt_has_as_many_words_as_tokens_and_no_two_are_alike() -> None:
    prompts = [p.prompt for p in schedule(prompt_tokens=Fixed(12))]
    assert {len(prompt.split()) for prompt in prompts} == {12}
    assert len(set(prompts)) == len(prompts) > 100


def test_adapters_that_are_not_there_are_missed() -> None:
    with pytest.raises(ScenarioError, match="the server has none"):
        build(scenario(), "base", [], 0)
    only_base = build(scenario(models=Models(base_share=1.0)), "base", [], 0)
    assert {p.model for p in only_base} == {"base"}


def test_a_trace_is_sent_as_it_was_recorded(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"offset_s": 0.5, "model": "sql", "prompt": "hello", "max_tokens": 5}\n'
        '{"offset_s": 0.25, "prompt_tokens": 3, "max_tokens": 6}\n'
        '{"offset_s": 9.0, "prompt": "after the end", "max_tokens": 1}\n'
    )
    traced = scenario(arrivals=Trace(str(file)), bounds=Bounds(duration_s=1.0))
    first, second = build(traced, "base", [], 0)
    assert (first.offset_s, first.model, first.model_class, first.max_tokens) == (0.25, "base", "base", 6)
    assert len(first.prompt.split()) == 3
    assert second == Planned(0.5, "sql", "adapter", "hello", 5)
    assert len(build(replace(traced, bounds=Bounds(duration_s=99.0, max_requests=1)), "base", [], 0)) == 1


@pytest.mark.parametrize(
    "line", ['{"offset_s": 1}', "{", '{"offset_s": 1, "max_tokens": 1, "prompt": "a", "prompt_tokens": 1}']
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"offset_s": 0, "prompt": "x", "max_tokens": 1}\n' + line)
    with pytest.raises(ScenarioError, match=r"trace\.jsonl:2: "):
        build(scenario(arrivals=Trace(str(file))), "base", [], 0)

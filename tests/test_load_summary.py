"""Numbers of made-up runs that can be computed by hand."""

import statistics

import numpy as np
import pytest

from load_tests.publishing import Change
from load_tests.scenarios import Bounds, Closed, Slo, Thresholds
from load_tests.summary import Goodput, Percentiles, is_good, percentiles, summarize
from load_tests.verdict import verdicts
from tests.fixtures.load_run import answered, refused, run_of


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = np.random.default_rng(0).exponential(size=137).tolist()
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = percentiles(values)
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))
    assert found.max == max(values)
    assert percentiles([]) is None


def test_a_request_that_was_sent_late_is_as_slow_as_its_user_found_it() -> None:
    """Coordinated omission: a stall delays those that come after it too."""
    stalled = [answered(float(second), late_s=10.0 - second, ttft_s=0.5, gaps_s=[0.25]) for second in range(10)]
    found = summarize(run_of(*stalled)).all
    assert found.ttft_s is not None and found.e2e_s is not None
    assert found.ttft_s.max == 10.5
    assert found.ttft_s.p50 == 6.0  # of 1.5, 2.5, … 10.5; from the time of sending it would be 0.5
    assert found.e2e_s.max == 10.75


def test_throughput_and_warm_up() -> None:
    bounds = Bounds(warm_up_s=2.0, duration_s=8.0)
    warm = answered(1.9, ttft_s=9.0, gaps_s=[])
    summary = summarize(
        run_of(warm, answered(2.0, gaps_s=[0.5]), answered(9.0, gaps_s=[0.25, 0.25]), refused(3.0), bounds=bounds)
    )
    assert summary.warm_up_requests == 1
    assert summary.measured_s == 8.0  # until 10.0, when the last answer ended
    assert summary.requests_per_s == 2 / 8
    assert summary.output_tokens_per_s == 5 / 8
    assert summary.prompt_tokens_per_s == 20 / 8
    assert (summary.all.requests, summary.all.failed) == (3, 1)
    assert summary.all.ttft_s == Percentiles(0.5, 0.5, 0.5, 0.5)
    assert summary.all.itl_s is not None and summary.all.itl_s.p50 == 0.25
    assert summary.errors == {"503 queue_full": 1}


@pytest.mark.parametrize(
    ("ttft_s", "gaps_s", "good"),
    [
        (1.0, [0.1, 0.1], True),
        (1.01, [0.0], False),
        (0.1, [0.15, 0.01], True),
        (0.1, [0.15, 0.15], False),
        (0.1, [], True),
    ],
)
def test_the_slo(ttft_s: float, gaps_s: list[float], good: bool) -> None:
    assert is_good(answered(0.0, ttft_s=ttft_s, gaps_s=gaps_s), Slo(ttft_s=1.0, itl_s=0.1)) is good


def test_several_tokens_in_one_event_are_several_tokens() -> None:
    record = answered(0.0, gaps_s=[0.3], output_tokens=5)
    assert is_good(record, Slo(ttft_s=1.0, itl_s=0.08)) and not is_good(record, Slo(ttft_s=1.0, itl_s=0.07))


def test_goodput_counts_failures_as_bad() -> None:
    summary = summarize(
        run_of(answered(0.0, gaps_s=[]), answered(3.5, gaps_s=[]), answered(1.0, ttft_s=2.0, gaps_s=[]), refused(1.0))
    )
    assert summary.goodput == Goodput(share=2 / 4, requests_per_s=2 / 4)


def test_classes_are_told_apart() -> None:
    summary = summarize(
        run_of(
            answered(0.0, ttft_s=0.5, gaps_s=[], model_class="head"),
            answered(1.0, ttft_s=1.5, gaps_s=[], model_class="tail"),
        )
    )
    assert {name: found.ttft_s and found.ttft_s.max for name, found in summary.classes.items()} == {
        "head": 0.5,
        "tail": 1.5,
    }


def test_the_generator_s_own_lateness_is_told_where_there_is_a_schedule() -> None:
    late = answered(0.0, late_s=0.25, gaps_s=[])
    assert summarize(run_of(late)).send_lag_s == Percentiles(0.25, 0.25, 0.25, 0.25)
    assert summarize(run_of(late, arrivals=Closed(1))).send_lag_s is None


def test_thresholds_hold() -> None:
    thresholds = Thresholds(errors=1, ttft_p99_s=0.5, goodput=0.5, requests=2)
    judged = verdicts(thresholds, summarize(run_of(answered(0.0, gaps_s=[]), refused(1.0))))
    assert {verdict.threshold: verdict.found for verdict in judged} == {
        "errors": 1,
        "ttft_p99_s": 0.5,
        "goodput": 0.5,
        "requests": 2,
    }
    assert all(verdict.passed for verdict in judged)


@pytest.mark.parametrize(
    ("thresholds", "missed"),
    [
        (Thresholds(errors=2), "errors"),  # one request and two changes failed
        (Thresholds(errors=3, ttft_p99_s=0.4), "ttft_p99_s"),
        (Thresholds(errors=3, itl_p99_s=0.1), "itl_p99_s"),
        (Thresholds(errors=3, e2e_p99_s=0.6), "e2e_p99_s"),
        (Thresholds(errors=3, send_lag_p99_s=0.001), "send_lag_p99_s"),
        (Thresholds(errors=3, requests=4), "requests"),
        (Thresholds(errors=3, goodput=0.7), "goodput"),
        (Thresholds(errors=3, changes=2), "changes"),
    ],
)
def test_a_threshold_is_missed(thresholds: Thresholds, missed: str) -> None:
    slow = answered(0.0, late_s=0.25, ttft_s=0.25, gaps_s=[0.2])
    changes = [Change("replace", "a", 0.0, 0.1, error) for error in (None, "507", "507")]
    judged = verdicts(thresholds, summarize(run_of(slow, slow, refused(1.0), changes=changes)))
    assert [verdict.threshold for verdict in judged if not verdict.passed] == [missed]


def test_a_run_that_measured_nothing_passes_no_threshold() -> None:
    judged = verdicts(Thresholds(ttft_p99_s=1.0, goodput=0.1), summarize(run_of()))
    assert [(verdict.threshold, verdict.passed) for verdict in judged] == [
        ("errors", True),
        ("ttft_p99_s", False),
        ("requests", False),
        ("goodput", False),
    ]

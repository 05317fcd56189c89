"""The arithmetic of the residency load tests; the servers that they start are not started here."""

from collections.abc import Callable

from load_tests.client import Record
from load_tests.residency import gaps, traffic


def record(first_s: float, *gaps_s: float, tokens: int = 0, error: str | None = None) -> Record:
    last_s = first_s + sum(gaps_s)
    return Record(
        model="a",
        model_class="adapter",
        scheduled_s=0.0,
        sent_s=0.0,
        first_token_s=first_s,
        last_token_s=last_s,
        gaps_s=list(gaps_s),
        output_tokens=tokens,
        error=error,
    )


def test_gaps_count_when_they_overlap_the_time_asked_for() -> None:
    records = [record(1.0, 1.0, 2.0, 4.0), record(0.0, 2.5)]
    assert sorted(gaps.gaps(records, 2.2, 3.0)) == [2.0, 2.5]
    assert gaps.decoding(records) == (2.5, 2.5)


def test_the_bound_is_that_of_the_quiet_rounds() -> None:
    quiet = [gaps.Seen([0.1] * 200, 0.0)]
    assert gaps.report(quiet, [gaps.Seen([0.1, 0.169], 1.0)])
    assert not gaps.report(quiet, [gaps.Seen([0.1, 0.171], 1.0)])


def test_a_round_is_its_tokens_by_its_time() -> None:
    found = traffic.summarize([record(0.5, tokens=30), record(1.5, tokens=10, error="timeout")], seconds=4.0)
    assert (found.tokens_per_s, found.ttft_p50_s, found.errors) == (10.0, 1.0, ["timeout"])


def test_the_target_is_missed_by_throughput_or_by_any_failure() -> None:
    def side(speed: float, *errors: str) -> traffic.Round:
        return traffic.Round(speed, 0.1, 0.2, list(errors))

    met: Callable[..., bool] = lambda *rounds: traffic.report(traffic.Setting(), rounds)  # noqa: E731
    assert met((side(80), side(100)))
    assert not met((side(79), side(100)))
    assert not met((side(90, "timeout"), side(100)))


def test_draws_are_those_of_zipf() -> None:
    names = [str(n) for n in range(100)]
    found = traffic.drawn(names, 5000)
    assert 1.6 < found.count("0") / found.count("1") < 2.4
    assert found == traffic.drawn(names, 5000)

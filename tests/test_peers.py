"""Measuring peers: who is asked what, and what is made of it. The peers themselves are not started here."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest

from load_tests.client import Record
from load_tests.peers.__main__ import measure, started
from load_tests.peers.ground import Ground
from load_tests.peers.http_server import summary
from load_tests.peers.process import Group, PeerFailed
from load_tests.peers.report import Report, plot, table
from load_tests.peers.setting import CASES, NEW_TOKENS, Case, Measured
from tests.fixtures.timing import HANG_SECONDS

GROUND = Ground(Path(), [], Path(), Path())


class Steady:
    """A peer of so many tokens per second."""

    name: ClassVar[str] = "Loraplex"
    version = "1"
    speed: ClassVar[float] = 30
    fails_at: ClassVar[int | None] = None  # round

    def __init__(self, ground: Ground) -> None:
        self.events: list[str] = []

    @staticmethod
    def takes(case: Case) -> bool:
        return True

    def run(self, case: Case, round_: int, new_tokens: int = NEW_TOKENS) -> Measured:
        self.events.append("run")
        if round_ == self.fails_at:
            raise PeerFailed("out of tokens")
        return Measured(self.speed + round_, [0.5] * case.streams, [0.01] * case.streams)

    def pause(self) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")

    def stop(self) -> None:
        self.events.append("stop")


class Slow(Steady):
    name = "slow"
    speed = 10


class Breaking(Steady):
    name = "breaking"
    fails_at = 1


class Missing(Steady):
    name = "missing"

    def __init__(self, ground: Ground) -> None:
        raise PeerFailed("no compiler")


def measured(*kinds: type[Steady]) -> tuple[Report, list[Any]]:
    report = Report("2026-01-01", "a machine", {})
    with ExitStack() as stack:
        peers = started(kinds, GROUND, report, stack)
        list(measure(peers, [Case(1, 0), Case(8, 8)], 2, report))
    return report, peers


def test_rounds_are_interleaved_and_only_who_is_measured_runs() -> None:
    report, (ours, slow) = measured(Steady, Slow)
    order = [(run.round, run.case, run.peer) for run in report.runs]
    assert order == sorted(order, key=lambda one: (one[0], one[1] == "8 on 8", one[2] == "slow"))
    assert len(order) == 2 * 2 * 2
    warm_up = ["run", "run", "pause"]
    for peer in (ours, slow):
        assert peer.events == [*warm_up, *["resume", "run", "pause"] * 4, "stop"]


def test_a_peer_that_fails_is_left_out_and_the_others_go_on() -> None:
    report, _ = measured(Steady, Missing, Breaking)
    assert report.failed == {"missing": "no compiler", "breaking": "1, base: out of tokens"}
    assert [run.peer for run in report.runs].count("Loraplex") == 4
    assert [run.peer for run in report.runs].count("breaking") == 2
    assert "missing left out: no compiler" in table(report)


def test_ratios_are_of_the_rounds_own() -> None:
    report, _ = measured(Steady, Slow)
    assert report.ratios("slow", "8 on 8") == [30 / 10, 31 / 11]
    assert "| 8 on 8 | 30 | 10 (2.91, 2.82 to 3.00) |" in table(report)
    assert [bar.get_height() for bar in plot(report).axes[0].patches] == [30.5, 30.5, 10.5, 10.5]


def test_prompts_differ_between_streams_rounds_and_cases() -> None:
    prompts = [prompt for round_ in (-1, 0, 1) for case in CASES for prompt in case.prompts(round_)]
    assert len({prompt[:24] for prompt in prompts}) == len(prompts)


def test_streams_take_turns_at_the_adapters() -> None:
    assert Case(3, 2).models() == ["adapter-0", "adapter-1", "adapter-0"]
    assert Case(2, 0).models() == ["base", "base"]


def record(**fields: Any) -> Record:
    seen = {"first_token_s": 1.0, "last_token_s": 2.0, "output_tokens": 5, **fields}
    return Record(model="", model_class="", scheduled_s=0, sent_s=0, **seen)


def test_throughput_counts_until_the_last_token_of_all() -> None:
    found = summary([record(), record(last_token_s=4.0)], 5)
    assert found == Measured(2.5, [1.0, 1.0], [0.25, 0.75])


@pytest.mark.parametrize("fault", [{"output_tokens": 4}, {"error": "timeout"}])
def test_an_answer_that_is_short_or_failed_is_a_failure(fault: dict[str, Any]) -> None:
    with pytest.raises(PeerFailed):
        summary([record(), record(**fault)], 5)


def test_a_process_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    group = Group(["sh", "-c", "echo no such model; exit 3"], tmp_path / "log")
    with pytest.raises(PeerFailed, match="no such model"):
        group.wait_for(lambda: False, HANG_SECONDS)
    group.stop()

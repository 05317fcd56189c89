"""Whether a run's numbers are within its scenario's thresholds."""

import operator
from collections.abc import Callable

import msgspec

from load_tests.scenarios import Thresholds
from load_tests.summary import Percentiles, Summary


class Verdict(msgspec.Struct, frozen=True):
    threshold: str
    bound: float
    found: float | None  # None when there was nothing to measure, which is a failure
    passed: bool


def verdicts(thresholds: Thresholds, summary: Summary) -> list[Verdict]:
    """One for each threshold that is set."""
    found: dict[str, tuple[float | None, Callable[[float, float], bool]]] = {
        "errors": (summary.all.failed + summary.failed_changes, operator.le),
        "ttft_p99_s": (_p99(summary.all.ttft_s), operator.le),
        "itl_p99_s": (_p99(summary.all.itl_s), operator.le),
        "e2e_p99_s": (_p99(summary.all.e2e_s), operator.le),
        "send_lag_p99_s": (_p99(summary.send_lag_s), operator.le),
        "requests": (summary.all.requests, operator.ge),
        "goodput": (summary.goodput.share, operator.ge),
        "changes": (summary.changes, operator.ge),
    }
    judged = []
    for name, bound in msgspec.structs.asdict(thresholds).items():
        if bound is not None:
            value, holds = found[name]
            judged.append(Verdict(name, bound, value, value is not None and holds(value, bound)))
    return judged


def _p99(percentiles: Percentiles | None) -> float | None:
    return None if percentiles is None else percentiles.p99

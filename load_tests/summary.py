"""Numbers out of a run. Latencies count from the scheduled time: a late request is the server's fault, not its luck."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from load_tests.client import Record
from load_tests.runner import Run
from load_tests.scenarios import Closed, Slo


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float
    max: float


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that succeeded, in seconds; None when there are no values."""

    requests: int
    failed: int
    ttft_s: Percentiles | None
    itl_s: Percentiles | None  # gaps between one event with text and the next
    e2e_s: Percentiles | None


class Goodput(msgspec.Struct, frozen=True):
    share: float
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Of the counted requests, unless it says otherwise."""

    all: Latencies
    warm_up_requests: int
    measured_s: float  # from the end of the warm-up to the end of the last counted request
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    goodput: Goodput
    send_lag_s: Percentiles | None  # how late the generator itself was
    errors: dict[str, int]  # "status code" → how often
    classes: dict[str, Latencies]
    changes: int
    failed_changes: int
    change_s: Percentiles | None


def summarize(run: Run) -> Summary:
    bounds = run.scenario.bounds
    counted = [record for record in run.records if record.scheduled_s >= bounds.warm_up_s]
    done = [record for record in counted if record.error is None]
    measured_s = max((ended_s(record) for record in done), default=bounds.warm_up_s) - bounds.warm_up_s
    good = sum(is_good(record, run.scenario.slo) for record in done)
    closed = isinstance(run.scenario.arrivals, Closed)
    return Summary(
        all=latencies(counted),
        warm_up_requests=len(run.records) - len(counted),
        measured_s=measured_s,
        requests_per_s=_per(len(done), measured_s),
        output_tokens_per_s=_per(sum(record.output_tokens for record in done), measured_s),
        prompt_tokens_per_s=_per(sum(record.prompt_tokens for record in done), measured_s),
        goodput=Goodput(_per(good, len(counted)), _per(good, measured_s)),
        send_lag_s=None if closed else percentiles(record.sent_s - record.scheduled_s for record in counted),
        errors=dict(Counter(f"{record.status} {record.error}" for record in counted if record.error is not None)),
        classes={name: latencies(members) for name, members in by_class(counted).items()},
        changes=sum(change.error is None for change in run.changes),
        failed_changes=sum(change.error is not None for change in run.changes),
        change_s=percentiles(change.took_s for change in run.changes if change.error is None),
    )


def latencies(records: Sequence[Record]) -> Latencies:
    done = [record for record in records if record.error is None]
    return Latencies(
        requests=len(records),
        failed=len(records) - len(done),
        ttft_s=percentiles(map(ttft_s, done)),
        itl_s=percentiles(gap for record in done for gap in record.gaps_s),
        e2e_s=percentiles(map(e2e_s, done)),
    )


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """With linear interpolation between neighbours, as NumPy's default; None of nothing."""
    array = np.fromiter(values, float)
    return Percentiles(*np.percentile(array, (50, 90, 99, 100)).tolist()) if array.size else None


def by_class(records: Iterable[Record]) -> dict[str, list[Record]]:
    classes: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.model_class):
        classes.setdefault(record.model_class, []).append(record)
    return classes


def ttft_s(record: Record) -> float:
    """Only of a request that succeeded."""
    assert record.first_token_s is not None
    return record.first_token_s - record.scheduled_s


def e2e_s(record: Record) -> float:
    return ended_s(record) - record.scheduled_s


def ended_s(record: Record) -> float:
    assert record.last_token_s is not None
    return record.last_token_s


def is_good(record: Record, slo: Slo) -> bool:
    """Whether a request that succeeded kept to the SLO; the mean over its tokens stands for its inter-token latency."""
    between_tokens_s = sum(record.gaps_s) / max(1, record.output_tokens - 1)
    return ttft_s(record) <= slo.ttft_s and between_tokens_s <= slo.itl_s


def _per(amount: float, divisor: float) -> float:
    return amount / divisor if divisor else 0.0

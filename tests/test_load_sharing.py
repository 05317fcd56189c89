"""The verdicts of `load_tests.sharing`."""

import pytest

from load_tests import sharing
from load_tests.client import Record


def record(latency_s: float, error: str | None = None) -> Record:
    return Record(
        model="base",
        model_class="base",
        scheduled_s=1.0,
        sent_s=1.0,
        first_token_s=1.0 + latency_s / 2,
        last_token_s=1.0 + latency_s,
        gaps_s=[latency_s / 2],
        output_tokens=2,
        error=error,
    )


def test_what_runs_when_the_bound_is_reached_may_finish() -> None:
    setting = sharing.Starvation(bound=64, streams=8, new_tokens=24)
    assert sharing.report_starvation(setting, [70, 96])
    assert not sharing.report_starvation(setting, [70, 97])


def test_the_light_tenant_may_wait_half_as_long_again() -> None:
    alone = [record(1.0)] * 20
    assert sharing.report_fairness([(alone, [record(1.49)] * 20)])
    assert not sharing.report_fairness([(alone, [record(1.51)] * 20)])


def test_a_failed_request_of_the_light_tenant_is_no_latency() -> None:
    with pytest.raises(RuntimeError, match="timeout"):
        sharing.report_fairness([([record(1.0)], [record(1.0, error="timeout")])])

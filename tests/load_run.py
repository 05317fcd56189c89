"""Made-up load-test runs, for tests of what is computed from them."""

from typing import Any

from load_tests.client import Record
from load_tests.publishing import Change
from load_tests.runner import Run
from load_tests.scenarios import Bounds, Poisson, Scenario, Slo


def scenario(**changes: Any) -> Scenario:
    settings: dict[str, Any] = {
        "name": "made-up",
        "description": "a <made-up> scenario",
        "arrivals": Poisson(rate=10.0),
        "bounds": Bounds(duration_s=60.0),
        "slo": Slo(ttft_s=1.0, itl_s=0.1),
    }
    return Scenario(**{**settings, **changes})


def answered(
    scheduled_s: float, *, late_s: float = 0.0, ttft_s: float = 0.5, gaps_s: list[float], **more: Any
) -> Record:
    """A request that succeeded; its first token came `ttft_s` after it was sent, which was `late_s` too late."""
    sent_s = scheduled_s + late_s
    settings: dict[str, Any] = {
        "model": "a",
        "model_class": "adapter",
        "scheduled_s": scheduled_s,
        "sent_s": sent_s,
        "first_token_s": sent_s + ttft_s,
        "last_token_s": sent_s + ttft_s + sum(gaps_s),
        "gaps_s": gaps_s,
        "prompt_tokens": 10,
        "output_tokens": 1 + len(gaps_s),
        "status": 200,
    }
    return Record(**{**settings, **more})


def refused(scheduled_s: float, status: int = 503, error: str = "queue_full") -> Record:
    return Record(
        model="<b>", model_class="adapter", scheduled_s=scheduled_s, sent_s=scheduled_s, status=status, error=error
    )


def run_of(*records: Record, changes: list[Change] | None = None, **settings: Any) -> Run:
    return Run(scenario(**settings), 0, "http://127.0.0.1:1", list(records), changes or [])

"""Scenarios: what traffic to send, what to expect of the server. TOML files, checked when they are read."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, ValidationError, convert, field
from msgspec.structs import replace

FOLDER = Path(__file__).parent / "scenarios"

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=1)]


class ScenarioError(Exception):
    """A scenario or trace that cannot be run; the message says where and why."""


class _Strict(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class Poisson(_Strict, tag="poisson", frozen=True):
    """Independent arrivals, `rate` a second on average."""

    rate: Positive


class Gamma(_Strict, tag="gamma", frozen=True):
    """Gaps from a gamma distribution: `cv` is their coefficient of variation; 1 is Poisson, more is burstier."""

    rate: Positive
    cv: Positive


class OnOff(_Strict, tag="on_off", frozen=True):
    """Poisson at `rate` for `on_s` seconds, then silence for `off_s`, and so on."""

    rate: Positive
    on_s: Positive
    off_s: NotNegative


class Trace(_Strict, tag="trace", frozen=True):
    """Recorded arrivals from a JSONL file, whose path is relative to the scenario's."""

    file: str


class Closed(_Strict, tag="closed", frozen=True):
    """A closed loop: each stream sends its next request when the last one has ended."""

    streams: Annotated[int, Meta(ge=1)]


class Fixed(_Strict, tag="fixed", frozen=True):
    tokens: Tokens


class Uniform(_Strict, tag="uniform", frozen=True):
    """Whole numbers from `low` to `high`, both included."""

    low: Tokens
    high: Tokens

    def __post_init__(self) -> None:
        _check(self.low <= self.high, "low is above high")


class Lognormal(_Strict, tag="lognormal", frozen=True):
    """exp(N(ln `median`, `sigma`)), cut off at `low` and `high`."""

    median: Positive
    sigma: NotNegative
    low: Tokens
    high: Tokens

    def __post_init__(self) -> None:
        _check(self.low <= self.high, "low is above high")


class Models(_Strict, frozen=True):
    """Which model a request names. `published` adapters are made for the run, out of the template adapter; with 0,
    those that the server has are asked."""

    adapters: Literal["zipf", "uniform"] = "uniform"
    exponent: NotNegative = 1.0
    base_share: Share = 0.0
    published: Count = 0


class Bounds(_Strict, kw_only=True, frozen=True):
    """When to stop sending. Requests of the first `warm_up_s` seconds are sent and not counted."""

    warm_up_s: NotNegative = 0.0
    duration_s: Positive
    max_requests: Annotated[int, Meta(ge=1)] = 10_000
    request_timeout_s: Positive = 60.0


class Slo(_Strict, frozen=True):
    """A request is good when its first token came within `ttft_s` of its scheduled time, and its later tokens within
    `itl_s` of each other on average."""

    ttft_s: Positive
    itl_s: Positive


class Thresholds(_Strict, frozen=True):
    """What decides the verdict; one that is left out is not asked. Every one but the last three is an upper bound."""

    errors: Count = 0
    ttft_p99_s: Positive | None = None
    itl_p99_s: Positive | None = None
    e2e_p99_s: Positive | None = None
    send_lag_p99_s: Positive | None = None
    requests: Annotated[int, Meta(ge=1)] = 1
    goodput: Share | None = None
    changes: Count | None = None


class Churn(_Strict, frozen=True):
    """Under traffic, every `every_s` seconds a published adapter is replaced, or a new one uploaded and deleted."""

    every_s: Positive


class Scenario(_Strict, kw_only=True, frozen=True):
    name: str
    description: str
    endpoint: Literal["completions", "chat"] = "completions"
    arrivals: Poisson | Gamma | OnOff | Trace | Closed
    models: Models = field(default_factory=Models)
    prompt_tokens: Fixed | Uniform | Lognormal = Fixed(tokens=64)
    output_tokens: Fixed | Uniform | Lognormal = Fixed(tokens=32)
    bounds: Bounds
    slo: Slo
    thresholds: Thresholds = field(default_factory=Thresholds)
    churn: Churn | None = None

    def __post_init__(self) -> None:
        _check(self.churn is None or self.models.published > 0, "churn needs models.published")


class TraceLine(_Strict, kw_only=True, frozen=True):
    """One recorded request. No `model` is the base; without `prompt`, one of `prompt_tokens` words is made up."""

    offset_s: NotNegative
    model: str | None = None
    prompt: str | None = None
    prompt_tokens: Tokens | None = None
    max_tokens: Tokens

    def __post_init__(self) -> None:
        _check((self.prompt is None) != (self.prompt_tokens is None), "either prompt or prompt_tokens is needed")


def _check(held: bool, otherwise: str) -> None:
    if not held:
        raise ValueError(otherwise)


def load(scenario: str) -> Scenario:
    """The scenario of that file, or of that name in `load_tests/scenarios`. Raises `ScenarioError`."""
    path = Path(scenario) if scenario.endswith(".toml") else FOLDER / f"{scenario}.toml"
    try:
        found = convert({"name": path.stem, **tomllib.loads(path.read_text())}, Scenario)
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    return _with_trace_beside(found, path)


def _with_trace_beside(scenario: Scenario, path: Path) -> Scenario:
    if not isinstance(scenario.arrivals, Trace):
        return scenario
    return replace(scenario, arrivals=Trace(file=str(path.parent / scenario.arrivals.file)))

"""The whole of a run's requests, drawn before it starts: the same scenario and seed give the same schedule."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from load_tests.scenarios import (
    Closed,
    Fixed,
    Gamma,
    Lognormal,
    OnOff,
    Poisson,
    Scenario,
    ScenarioError,
    Trace,
    TraceLine,
    Uniform,
)

Floats = NDArray[np.float64]

# Each is one token in most vocabularies, so that a prompt of n words has about n tokens.
_TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now over such our man me even most made after
also did many off before must well back through years much where your way down should because long each just state those
people too little good world make very year still see own work men day get
"""
WORDS = _TEXT.split()


class Planned(msgspec.Struct, frozen=True):
    """One request of the schedule. `offset_s` counts from the start of the run; in a closed loop it is 0."""

    offset_s: float
    model: str
    model_class: str  # "base", "head", "tail" or "adapter"
    prompt: str
    max_tokens: int
    fields: dict[str, Any] = {}  # of the request's body, beyond what follows from the others


def build(scenario: Scenario, base: str, adapters: Sequence[str], seed: int) -> list[Planned]:
    """Draw every request. What is drawn does not depend on the other draws: arrivals stay when lengths change.

    Raises `ScenarioError` when the scenario asks for adapters and there are none, or its trace cannot be read.
    """
    arrivals_rng, models_rng, prompts_rng, outputs_rng, words_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5)
    )
    bounds = scenario.bounds
    if isinstance(scenario.arrivals, Trace):
        return _recorded(scenario, base, words_rng)
    offsets = arrival_times(scenario.arrivals, bounds.warm_up_s + bounds.duration_s, bounds.max_requests, arrivals_rng)
    count = len(offsets)
    weights = model_weights(scenario, base, adapters)
    models = models_rng.choice(list(weights), size=count, p=list(weights.values())).tolist()
    classes = model_classes(weights, base)
    prompts = token_counts(scenario.prompt_tokens, count, prompts_rng)
    outputs = token_counts(scenario.output_tokens, count, outputs_rng)
    return [
        Planned(float(offset), model, classes[model], made_up_prompt(int(prompt), words_rng), int(output))
        for offset, model, prompt, output in zip(offsets, models, prompts, outputs, strict=True)
    ]


def arrival_times(
    arrivals: Poisson | Gamma | OnOff | Closed, until_s: float, limit: int, rng: np.random.Generator
) -> Floats:
    """Seconds from the start of the run, ascending: at most `limit`, all below `until_s`."""
    match arrivals:
        case Closed():
            return np.zeros(limit)
        case Poisson(rate=rate):
            times = np.cumsum(rng.exponential(1 / rate, limit))
        case Gamma(rate=rate, cv=cv):
            times = np.cumsum(rng.gamma(cv**-2, cv**2 / rate, limit))
        case OnOff(rate=rate, on_s=on_s, off_s=off_s):
            busy = np.cumsum(rng.exponential(1 / rate, limit))  # seconds within the on periods alone
            times = busy + off_s * (busy // on_s)
    return times[times < until_s]


def token_counts(distribution: Fixed | Uniform | Lognormal, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    match distribution:
        case Fixed(tokens=tokens):
            return np.full(count, tokens)
        case Uniform(low=low, high=high):
            return rng.integers(low, high, count, endpoint=True)
        case Lognormal(median=median, sigma=sigma, low=low, high=high):
            drawn = rng.lognormal(np.log(median), sigma, count)
            return np.clip(np.rint(drawn), low, high).astype(np.int64)


def model_weights(scenario: Scenario, base: str, adapters: Sequence[str]) -> dict[str, float]:
    """The probability of each model; the first adapter is Zipf's most frequent one."""
    models = scenario.models
    if not adapters and models.base_share < 1:
        raise ScenarioError(f"scenario '{scenario.name}' asks for adapters, and the server has none")
    exponent = models.exponent if models.adapters == "zipf" else 0.0
    shares = np.arange(1.0, len(adapters) + 1) ** -exponent
    shares *= (1 - models.base_share) / shares.sum() if adapters else 1
    return {base: models.base_share, **dict(zip(adapters, shares.tolist(), strict=True))}


def model_classes(weights: Mapping[str, float], base: str) -> dict[str, str]:
    """The base is "base". Of the adapters, "head" are the most frequent ones that together get half of the
    requests, "tail" the others; all are "adapter" when none is asked more often than another."""
    ranked = sorted((name for name in weights if name != base), key=lambda name: -weights[name])
    if len({weights[name] for name in ranked}) <= 1:
        return {base: "base", **dict.fromkeys(ranked, "adapter")}
    total, before, classes = sum(weights[name] for name in ranked), 0.0, {base: "base"}
    for name in ranked:
        classes[name] = "head" if before < total / 2 else "tail"
        before += weights[name]
    return classes


def made_up_prompt(tokens: int, rng: np.random.Generator) -> str:
    """Random words, so that no prompt is served from the cache of another."""
    return " ".join(rng.choice(WORDS, tokens).tolist())


def _recorded(scenario: Scenario, base: str, rng: np.random.Generator) -> list[Planned]:
    assert isinstance(scenario.arrivals, Trace)
    bounds = scenario.bounds
    lines = sorted(read_trace(Path(scenario.arrivals.file)), key=lambda line: line.offset_s)[: bounds.max_requests]
    kept = [line for line in lines if line.offset_s < bounds.warm_up_s + bounds.duration_s]
    classes = model_classes(Counter(line.model or base for line in kept), base)
    return [
        Planned(
            line.offset_s,
            line.model or base,
            classes[line.model or base],
            line.prompt if line.prompt is not None else made_up_prompt(line.prompt_tokens or 1, rng),
            line.max_tokens,
        )
        for line in kept
    ]


def read_trace(file: Path) -> list[TraceLine]:
    """Raises `ScenarioError`, naming the line."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ScenarioError(f"{file}: {error.strerror}") from error
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(msgspec.json.decode(line, type=TraceLine))
        except msgspec.DecodeError as error:
            raise ScenarioError(f"{file}:{number}: {error}") from error
    return read

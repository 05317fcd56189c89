"""Decide whether what a client returned is right: by its content, never by the absence of an error."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jsonschema

from load_tests.clients.task import TASK

CLOSE = 1e-4  # log-probabilities and embeddings of two runs of the same request, which may share other batches


class Expected(NamedTuple):
    """The responses of a model to the same requests, sent without any client."""

    text: str
    logprobs: list[float]
    embeddings: list[list[float]]


class Wrong(Exception):
    """What a client returned is not what the model says."""


def check_chat(value: Any, expected: Expected) -> None:
    _same("text", value, expected.text)


def check_stream(value: Any, expected: Expected) -> None:
    """The deltas add up to the text of a response that is not streamed: the client's own if its prompt is its own."""
    deltas = value["deltas"]
    if sum(map(bool, deltas)) < 2:
        raise Wrong(f"{len(deltas)} deltas are no stream")
    _same("text of all deltas", "".join(deltas), value.get("whole", expected.text))


def check_tools(value: Any, _: Expected) -> None:
    """The call has the right name and arguments of the right types, streamed as well, and its result gets an answer."""
    for calls in (value["calls"], value.get("streamed", value["calls"])):
        if not calls:
            raise Wrong("no call")
        for call in calls:
            _same("name of the call", call["name"], TASK["weather"]["name"])
            _valid(call["arguments"], TASK["weather"]["parameters"])
    _same("streamed calls", value.get("streamed", value["calls"]), value["calls"])
    if not value.get("answer", "without a second turn"):
        raise Wrong("no answer to the result of the call")


def check_json_schema(value: Any, _: Expected) -> None:
    _valid(value, TASK["person"]["schema"])


def check_embeddings(value: Any, expected: Expected) -> None:
    _same("number of embeddings", len(value), len(TASK["texts"]))
    for vector, wanted in zip(value, expected.embeddings, strict=True):
        _same("length of an embedding", len(vector), len(wanted))
        if abs(math.hypot(*vector) - 1) > CLOSE:
            raise Wrong(f"the norm of an embedding is {math.hypot(*vector)}")
        _close("embedding", vector, wanted)


def check_logprobs(value: Any, expected: Expected) -> None:
    _same("number of log-probabilities", len(value), len(expected.logprobs))
    _close("log-probability", value, expected.logprobs)


CHECKS: Mapping[str, Callable[[Any, Expected], None]] = {
    "chat": check_chat,
    "stream": check_stream,
    "tools": check_tools,
    "json_schema": check_json_schema,
    "embeddings": check_embeddings,
    "logprobs": check_logprobs,
}


def _same(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r} instead of {wanted!r}")


def _close(what: str, found: list[float], wanted: list[float]) -> None:
    for value, other in zip(found, wanted, strict=True):
        if not math.isfinite(value) or abs(value - other) > CLOSE:
            raise Wrong(f"{what}: {value} instead of {other}")


def _valid(value: Any, schema: Any) -> None:
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        raise Wrong(f"{value!r} is not valid: {error.message}") from None

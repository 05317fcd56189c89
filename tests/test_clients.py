"""The matrix of clients: what decides its cells, and whether the page is that of the script."""

import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from load_tests.clients import page
from load_tests.clients.checks import CHECKS, Expected, Wrong
from load_tests.clients.environment import PINS
from load_tests.clients.matrix import CLIENTS, FEATURES, NODE, Cell, Client, combined
from load_tests.clients.task import DRIVERS, TASK

MATRIX = page.load()
EXPECTED = Expected("Paris.", [-0.5, -0.25], [[0.6, 0.8], [1.0, 0.0]])
CALL = {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}

RIGHT: dict[str, Any] = {
    "chat": "Paris.",
    "stream": {"deltas": ["Par", "", "is."]},
    "tools": {"calls": [CALL], "streamed": [CALL], "answer": "Sunny."},
    "json_schema": {"name": "Ann", "age": 34},
    "embeddings": [[0.6, 0.8], [1.0, 0.0]],
    "logprobs": [-0.5, -0.25],
}
WRONG: dict[str, list[Any]] = {
    "chat": ["Paris", "", None],
    "stream": [
        {"deltas": ["Paris."]},
        {"deltas": ["Par", "is"]},
        {"deltas": []},
        {"deltas": ["a", "b"], "whole": "a"},
    ],
    "tools": [
        {"calls": []},
        {"calls": [{**CALL, "name": "weather"}]},
        {"calls": [{**CALL, "arguments": {"city": "Paris", "days": "3"}}]},
        {"calls": [{**CALL, "arguments": {"city": "Paris"}}]},
        {"calls": [CALL], "streamed": []},
        {"calls": [CALL], "streamed": [{**CALL, "arguments": {"city": "Rome", "days": 3}}]},
        {"calls": [CALL], "answer": ""},
        {"calls": [CALL], "answer": None},
    ],
    "json_schema": [{"name": "Ann"}, {"name": "Ann", "age": "34"}, '{"name": "Ann", "age": 34}', None],
    "embeddings": [[[0.6, 0.8]], [[0.6, 0.8], [1.0]], [[0.8, 0.6], [1.0, 0.0]], [[math.nan, 0.8], [1.0, 0.0]]],
    "logprobs": [[-0.5], [-0.5, -0.3], [-0.5, -math.inf], [-0.5, math.nan]],
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_cell_is_decided_by_its_content(feature: str) -> None:
    CHECKS[feature](RIGHT[feature], EXPECTED)
    for value in WRONG[feature]:
        with pytest.raises(Wrong):
            CHECKS[feature](value, EXPECTED)


def test_a_cell_that_fails_with_one_model_fails() -> None:
    passed, failed, absent = Cell("passed"), Cell("failed", "no call"), Cell("absent", "none")
    assert combined({"base": passed, "own": passed}) == passed
    assert combined({"base": passed, "own": failed}) == Cell("failed", "own: no call")
    assert combined({"base": absent, "own": absent}) == absent
    assert combined({"base": passed, "own": absent}) == Cell("passed", "own: none")
    assert combined({"base": absent, "own": failed}).outcome == "failed"


def test_the_results_have_the_rows_and_columns_of_the_script() -> None:
    assert [row.client for row in MATRIX.rows] == [client.name for client in CLIENTS]
    assert all([*row.cells] == [*FEATURES] for row in MATRIX.rows)
    assert all(cell.detail for row in MATRIX.rows for cell in row.cells.values() if cell.outcome != "passed")


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_row_has_the_pinned_versions(client: Client) -> None:
    (row,) = [row for row in MATRIX.rows if row.client == client.name]
    pins = dict(_pins(client.environment))
    assert row.versions == {package: pins[package] for package in client.packages}
    assert (DRIVERS / client.driver).exists()


def _pins(environment: str) -> Iterator[tuple[str, str]]:
    if environment == NODE:
        yield from msgspec.json.decode((PINS / "package.json").read_bytes())["dependencies"].items()
        return
    for line in (PINS / f"{environment}.txt").read_text().splitlines():
        if found := re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line):
            yield found[1], found[2]


def test_no_client_fails() -> None:
    failed = [(row.client, name) for row in MATRIX.rows for name, cell in row.cells.items() if cell.outcome == "failed"]
    assert failed == []
    assert TASK["max_tokens"] > 1

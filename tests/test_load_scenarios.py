"""Scenario files: those that ship can be read, and mistakes are named."""

from pathlib import Path

import pytest

from load_tests.__main__ import SHORT_SET
from load_tests.scenarios import FOLDER, Fixed, Gamma, ScenarioError, Trace, load

MINIMAL = """
description = "d"
arrivals = {kind = "gamma", rate = 2.0, cv = 3.0}
bounds = {duration_s = 1.0}
slo = {ttft_s = 1.0, itl_s = 1.0}
"""


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.toml")))
def test_a_scenario_that_ships_can_be_read_by_its_name(name: str) -> None:
    assert load(name).name == name


def test_the_short_set_is_of_scenarios_that_ship() -> None:
    assert set(SHORT_SET) <= {file.stem for file in FOLDER.glob("*.toml")}


def test_a_file_is_read_with_defaults(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(MINIMAL)
    found = load(str(tmp_path / "own.toml"))
    assert (found.name, found.arrivals, found.output_tokens) == ("own", Gamma(2.0, 3.0), Fixed(32))
    assert found.thresholds.errors == 0 and found.thresholds.goodput is None


def test_a_trace_lies_beside_its_scenario(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(MINIMAL.replace('"gamma", rate = 2.0, cv = 3.0', '"trace", file = "day.jsonl"'))
    assert load(str(tmp_path / "own.toml")).arrivals == Trace(str(tmp_path / "day.jsonl"))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rate = 2.0", "rate = 0.0", "$.arrivals.rate"),
        ("rate = 2.0", "speed = 2.0", "speed"),
        ('"gamma"', '"gaussian"', "gaussian"),
        ("slo =", "sla =", "sla"),
        ("bounds =", "output_tokens = {kind = 'uniform', low = 3, high = 2}\nbounds =", "low is above high"),
        ("bounds =", "churn = {every_s = 1.0}\nbounds =", "churn needs models.published"),
        ("description", "=", "Invalid"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, named: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(MINIMAL.replace(old, new))
    with pytest.raises(ScenarioError) as refused:
        load(str(file))
    assert named in str(refused.value) and "own.toml" in str(refused.value)


def test_a_scenario_that_is_not_there_is_named() -> None:
    with pytest.raises(ScenarioError, match=r"nowhere\.toml: No such file"):
        load("nowhere")

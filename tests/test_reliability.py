"""The page of reliability says of every case what shows it."""

import re
from pathlib import Path

import pytest

from docs import reliability

ROOT = Path(__file__).parent.parent


def test_the_page_is_that_of_the_markers_and_results() -> None:
    assert reliability.DOCUMENT.read_text(encoding="utf-8") == reliability.page(), "run 'make docs'"


def test_every_case_has_a_test_a_run_or_a_reason() -> None:
    tests, results = reliability.marked(), reliability.results()
    for case in reliability.cases():
        is_shown = case.id in tests or "run" in results.get(case.id, {})
        assert is_shown is not bool(case.missing), case.id


def test_markers_and_results_are_of_cases() -> None:
    known = {case.id for case in reliability.cases()}
    assert reliability.marked().keys() <= known and reliability.results().keys() <= known


def test_no_marker_is_missed() -> None:
    """Markers count on functions of a module alone: what a collection finds is what the page has."""
    marked = {test for tests in reliability.marked().values() for test in tests}
    for path in (ROOT / "tests").glob("test_*.py"):
        if path.name != Path(__file__).name:
            written = len(re.findall(r"mark\.reliability\(", path.read_text(encoding="utf-8")))
            assert written == sum(test.startswith(f"{path.name}::") for test in marked), path.name


def test_the_page_says_that_a_case_has_no_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "RESULTS", tmp_path / "none.json")
    monkeypatch.setattr(reliability, "marked", dict)
    rows = [line for line in reliability.page().splitlines() if re.match(r"\| T\d", line)]
    assert len(rows) == len(reliability.cases()) and all("| no test: " in row for row in rows)


def test_results_are_recorded_in_the_order_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "RESULTS", tmp_path / "results.json")
    result = {"figures": ["2 passed", "p99 3 ms"], "date": "2026-01-01", "machine": "one core"}
    for case in ("T70", "T2", "T10"):
        reliability.record(case, "tests", result)
    reliability.record("T2", "run", {**result, "figures": ["long"], "command": "make x", "file": "Makefile"})
    assert list(reliability.results()) == ["T2", "T10", "T70"]
    assert "2 passed; p99 3 ms; 2026-01-01, one core<br>long; 2026-01-01, one core" in reliability.page()

"""Write docs/reliability.md from the catalogue of cases, the `reliability` markers of the tests and the recorded
results: `make docs`. Results are recorded by `make reliability` and by the long runs of `load_tests`."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from docs.tables import table

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "docs" / "reliability_cases.toml"
RESULTS = ROOT / "docs" / "reliability_results.json"
DOCUMENT = ROOT / "docs" / "reliability.md"

_TIERS = {
    "P": "`make test`",
    "C": "`make test-all`",
    "N": "`make soak`, `make chaos`",
    "G": "a GPU",
}
_HEAD = """# Reliability

What the server must withstand, the tests that show it, and their last recorded results. This page is written from
[the catalogue](reliability_cases.toml), the `reliability` markers of the tests and
[the recorded results](reliability_results.json) by `make docs`. `make reliability` runs the marked tests and records
them; `pytest -m reliability` runs them without a record.

Faults are injected at fault points (`adapters/fault_points.py`), which `LORAPLEX_FAULT=point[:when][=action]` arms in a
server of a test, and by signals, limits and fake peers. Durations are of the machine named beside them.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the catalogue. `missing` is the reason why it has no test, and `unmet` what its result falls short
    of; both are mostly empty."""

    id: str
    tier: str
    fault: str
    criterion: str
    missing: str = ""
    unmet: str = ""


def cases() -> list[Case]:
    catalogue = tomllib.loads(CASES.read_text(encoding="utf-8"))
    return [Case(id, **fields) for id, fields in catalogue.items()]


def marked() -> dict[str, list[str]]:
    """Return the tests that are marked with each case, as file::name, read without importing them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for case in _marks(node):
                    found.setdefault(case, []).append(f"{path.name}::{node.name}")
    return found


def _marks(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reliability":
            yield from (str(ast.literal_eval(argument)) for argument in mark.args)


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def page() -> str:
    tests, recorded, listed = marked(), results(), cases()
    shown = [case for case in listed if case.id in tests or recorded.get(case.id, {}).get("run")]
    lines = [_HEAD, f"{len(shown)} of {len(listed)} cases have a test or a run; the others say why they have none.", ""]
    rows = (_row(case, tests.get(case.id, []), recorded.get(case.id, {})) for case in listed)
    lines.append(table(("case", "runs in", "what is injected", "pass criterion", "shown by", "last result"), rows))
    return "\n".join(lines) + "\n"


def _row(case: Case, tests: list[str], result: dict[str, Any]) -> tuple[str, ...]:
    shown = [_linked(test) for test in tests]
    if "run" in result:
        shown.append(f"[{result['run']['command']}](../{result['run']['file']})")
    return (
        case.id,
        _TIERS[case.tier],
        case.fault,
        case.criterion,
        "<br>".join(shown) or f"no test: {case.missing}",
        (_told(result) + (f"<br>**not met**: {case.unmet}" if case.unmet else "")) if shown else "",
    )


def _linked(test: str) -> str:
    file, name = test.split("::")
    return f"[{re.sub(r'^test_', '', name)}](../tests/{file})"


def _told(result: dict[str, Any]) -> str:
    """The results of the tests and of a run, which are recorded apart."""
    parts = [result[kind] for kind in ("tests", "run") if kind in result]
    lines = ("; ".join([*part["figures"], f"{part['date']}, {part['machine']}"]) for part in parts)
    return "<br>".join(lines) or "not recorded"


def record(case: str, kind: Literal["tests", "run"], result: dict[str, Any]) -> None:
    """Replace the recorded result of a case: of its tests, or of a run that has a `command` and a `file`."""
    found = results()
    found[case] = found.get(case, {}) | {kind: result}
    order = {known.id: place for place, known in enumerate(cases())}
    lines = {id: found[id] for id in sorted(found, key=lambda id: order[id])}
    RESULTS.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")

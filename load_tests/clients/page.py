"""The tables of `docs/reference/clients.md`, from the results of the last run."""

from pathlib import Path

import msgspec

from load_tests.clients.matrix import FEATURES, Matrix, Row

RESULTS = Path(__file__).parents[1] / "results" / "clients.json"
SIGNS = {"passed": "✓", "failed": "✗", "absent": "–"}
Rows = list[tuple[str, ...]]


def load() -> Matrix:
    return msgspec.json.decode(RESULTS.read_bytes(), type=Matrix)


def save(matrix: Matrix) -> None:
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(matrix), indent=2) + b"\n")


def table_head() -> tuple[str, ...]:
    return ("client", "versions", *FEATURES.values())


def table_rows(matrix: Matrix) -> Rows:
    return [(row.client, _versions(row), *(SIGNS[row.cells[name].outcome] for name in FEATURES)) for row in matrix.rows]


def _versions(row: Row) -> str:
    return ", ".join(f"{package} {version}" for package, version in row.versions.items())


def reasons(matrix: Matrix) -> Rows:
    """Return the cells that did not pass with every model, with the reason."""
    return [
        (row.client, FEATURES[name], SIGNS[cell.outcome], cell.detail)
        for row in matrix.rows
        for name, cell in row.cells.items()
        if cell.detail
    ]


def setting(matrix: Matrix) -> Rows:
    return [
        ("date", matrix.date),
        ("Loraplex", matrix.server),
        ("models", ", ".join(f"`{model}`" for model in matrix.models)),
        ("Python", matrix.python),
        ("Node", matrix.node),
    ]

"""Run the driver of a client against a live server, and judge what it reports."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from load_tests.clients import environment
from load_tests.clients.checks import CHECKS, Expected, Wrong
from load_tests.clients.matrix import FEATURES, NODE, Cell, Client, Row, combined
from load_tests.clients.task import DRIVERS

DRIVER_S = 900


def run_client(client: Client, cache: Path, url: str, expected: Mapping[str, Expected]) -> Row:
    """Return the row of a client, which is asked for all features of every model in `expected`."""
    if client.environment == NODE:
        folder = environment.node_modules_of(cache)
        versions = environment.node_versions(folder, client.packages)
        command = ["node", str(_beside_node_modules(client, folder))]
    else:
        python = environment.python_of(client.environment, cache)
        versions = environment.python_versions(python, client.packages)
        command = [str(python), str(DRIVERS / client.driver)]
    found = {model: _cells(command, url, model, wanted) for model, wanted in expected.items()}
    cells = {feature: combined({model: cells[feature] for model, cells in found.items()}) for feature in FEATURES}
    return Row(client.name, versions, cells)


def _beside_node_modules(client: Client, folder: Path) -> Path:
    """Copy the JavaScript drivers into the folder with their packages, where Node looks for these."""
    for source in (*DRIVERS.glob("*.mjs"), DRIVERS / "task.json"):
        (folder / source.name).write_bytes(source.read_bytes())
    return folder / client.driver


def _cells(command: list[str], url: str, model: str, expected: Expected) -> dict[str, Cell]:
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "features.jsonl"
        env = {**os.environ, "LORAPLEX_URL": url, "LORAPLEX_MODEL": model, "HOME": home}
        try:
            done = subprocess.run(
                [*command, str(file)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                cwd=home,
                timeout=DRIVER_S,
                check=False,
            )
            said = done.stdout
        except subprocess.TimeoutExpired as error:
            said = f"no end after {DRIVER_S} seconds: {error.stdout!r}"
        found = dict(_judged(file, expected)) if file.exists() else {}
    if len(found) < len(FEATURES):
        print(said[-4000:])
    return {feature: found.get(feature, Cell("failed", "the driver reported nothing")) for feature in FEATURES}


def _judged(file: Path, expected: Expected) -> Iterator[tuple[str, Cell]]:
    for line in file.read_bytes().splitlines():
        report = msgspec.json.decode(line)
        yield report["feature"], _cell(report, expected)


def _cell(report: dict[str, Any], expected: Expected) -> Cell:
    if "absent" in report:
        return Cell("absent", report["absent"])
    if "error" in report:
        return Cell("failed", report["error"][:500])
    try:
        CHECKS[report["feature"]](report["value"], expected)
    except (Wrong, KeyError, TypeError, ValueError) as error:
        return Cell("failed", f"{type(error).__name__}: {error}"[:500])
    return Cell("passed")

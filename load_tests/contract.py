"""Requests that the OpenAPI document allows, and ones that it forbids, against a server over a tiny model.

    python -m load_tests.contract [--minutes 5] [--seed 1]

Schemathesis makes the requests: one at a time in its `coverage` and `fuzzing` phases, and sequences in its `stateful` phase.
Every response must have a status, content type and body that the document declares, and none may be a 5xx of a bug. Exit code
1: one was not.
"""

import subprocess
import sys
from collections.abc import Sequence

PHASES = ("examples", "coverage", "fuzzing", "stateful")


def schemathesis(url: str, key: str, *options: str, phases: Sequence[str] = PHASES) -> int:
    """Return the exit code of a run against the server at `url`: 0 if every response was as the document says."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    given = ["--header", f"Authorization: Bearer {key}", "--phases", ",".join(phases), *options]
    return subprocess.run([*command, *given], env=_environment(), check=False).returncode

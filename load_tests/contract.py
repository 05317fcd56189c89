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

import httpx
from transformers import AutoModelForCausalLM

from load_tests.own_server import serving
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import write_tiny_model

MODEL = "tiny"
CONFIG = Path(__file__).with_name("schemathesis.toml")
COMMAND = [str(Path(sys.executable).with_name("schemathesis"))]
ALWAYS = ("--no-color", "--generation-database", "none", "--request-timeout", "120")
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def schemathesis(url: str, key: str, model: str, adapter: Path, *options: str, phases: Sequence[str] = PHASES) -> int:
    """Return the exit code of a run against the server at `url`: 0 if every response was as the document says.
    `adapter` is a folder with an adapter for `model`."""
    authorization = f"Bearer {key}"
    document = httpx.get(f"{url}/openapi.json", headers={"authorization": authorization}, timeout=None)
    document.raise_for_status()
    given = ["--header", f"Authorization: {authorization}", "--phases", ",".join(phases), *ALWAYS, *options]
    hooks = {"SCHEMATHESIS_HOOKS": "load_tests.contract_hooks"}
    environment = {**os.environ, **hooks, "LORAPLEX_MODEL": model, "LORAPLEX_ADAPTER": str(adapter)}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:  # a busy server may take longer than it is waited for
        Path(file.name).write_bytes(document.content)
        command = [*COMMAND, "--config-file", str(CONFIG), "run", file.name, "--url", url, *given]
        return subprocess.run(command, env=environment, check=False).returncode


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
        registered = [part for name in ("first", "second", "third") for part in ("--adapter", f"{name}={adapter}")]
        with serving(Path(folder) / "data", *flags, *registered) as url:
            bounds = ("--max-time", str(int(options.minutes * 60)), "--seed", str(options.seed))
            sys.exit(schemathesis(url, key, MODEL, adapter, *bounds, "--continue-on-failure"))


if __name__ == "__main__":
    main()

"""Well-known clients against a live server, each feature checked by its content.

    python -m load_tests.clients [--only LangChain --only DSPy] [--cache DIR] [--url URL]

Installs the clients in the cache folder (some 3 GB; Node's packages by npm), starts a server with the embedded model
and the demo adapters, and asks every client for every feature of the base model and of an adapter. Writes
`load_tests/results/clients.json`, from which `python -m docs.tables` writes `docs/reference/clients.md`. With
`--only`, the other rows stay as they are. Exit code 1: a cell failed.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import server
from load_tests.clients import page
from load_tests.clients.expected import expected_of
from load_tests.clients.matrix import CLIENTS, Client, Matrix, Row
from load_tests.clients.runs import run_client
from load_tests.own_server import serving

CACHE = Path.home() / ".cache" / "loraplex" / "clients"
MODELS = ["smollm2-135m-instruct", "pirate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=[client.name for client in CLIENTS])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--url", default="", help="a server that runs already")
    options = parser.parse_args()
    wanted = [client for client in CLIENTS if not options.only or client.name in options.only]
    with tempfile.TemporaryDirectory() as folder, _server(options.url, Path(folder)) as url:
        rows = _run(wanted, options.cache, url)
    page.save(_matrix(rows))
    sys.exit(any(cell.outcome == "failed" for row in rows.values() for cell in row.cells.values()))


def _server(url: str, folder: Path) -> AbstractContextManager[str]:
    return nullcontext(url) if url else serving(folder, "--demo")


def _run(clients: list[Client], cache: Path, url: str) -> dict[str, Row]:
    expected = {model: expected_of(url, model) for model in MODELS}
    rows = {}
    for client in clients:
        rows[client.name] = row = run_client(client, cache, url, expected)
        print(f"{client.name}:", *(f"{name} {cell.outcome}" for name, cell in row.cells.items()), flush=True)
        print(*(f"  {name}: {cell.detail}" for name, cell in row.cells.items() if cell.outcome == "failed"), sep="\n")
    return rows


def _matrix(rows: dict[str, Row]) -> Matrix:
    """Return the matrix with these rows, and the earlier ones of the other clients."""
    earlier = {row.client: row for row in page.load().rows} if page.RESULTS.exists() else {}
    found = {**earlier, **rows}
    return Matrix(
        date=datetime.now(UTC).date().isoformat(),
        server=server.__version__,
        models=MODELS,
        python=platform.python_version(),
        node=subprocess.check_output(["node", "--version"], text=True).strip().removeprefix("v"),
        rows=[found[client.name] for client in CLIENTS if client.name in found],
    )


if __name__ == "__main__":
    main()

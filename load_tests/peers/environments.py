"""What a peer needs that Loraplex does not, in a folder of its own: made on the first use, kept for the next."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from load_tests.peers.process import PeerFailed


def environment(folder: Path, *packages: str) -> Path:
    """The interpreter of a virtual environment there, which is made with `packages`."""
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)], "making its virtual environment")
        pip(python, "install", "--upgrade", "pip", *packages)
    return python


def pip(python: Path, *arguments: str) -> None:
    run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], f"pip {arguments[0]}")


def run(command: Sequence[str], doing: str, env: Mapping[str, str] | None = None) -> None:
    """Raises `PeerFailed` with the end of what the command said."""
    print(f"  {doing} ...", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False)
    if done.returncode:
        raise PeerFailed(f"{doing}: {done.stdout[-2000:]}")


def installed(site_packages: Path, name: str) -> Distribution:
    return next(iter(Distribution.discover(name=name, path=[str(site_packages)])))

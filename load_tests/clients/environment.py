"""The packages of the clients, in folders of their own: installed on the first use, and anew when the pins change."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

PINS = Path(__file__).parent / "environments"


class InstallFailed(Exception):
    """The packages of an environment could not be installed."""


def python_of(name: str, cache: Path) -> Path:
    """Return the interpreter of the environment of `environments/NAME.txt`."""
    pins = PINS / f"{name}.txt"
    folder = cache / name
    if not _is_current(folder, pins):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], f"making the environment {name}")
        _run(
            [
                str(folder / "bin" / "pip"),
                "--disable-pip-version-check",
                "install",
                "--quiet",
                "--no-compile",
                "-r",
                str(pins),
            ],
            f"installing {pins.name}",
        )
        _mark(folder, pins)
    return folder / "bin" / "python"


def node_modules_of(cache: Path) -> Path:
    """Return the folder with `node_modules` of `environments/package.json`."""
    pins = PINS / "package.json"
    folder = cache / "node"
    if not _is_current(folder, pins):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(pins, folder)
        _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)], "npm install")
        _mark(folder, pins)
    return folder


def python_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    code = "import sys, json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    return _decoded(subprocess.check_output([str(python), "-c", code, *packages]))


def node_versions(folder: Path, packages: Sequence[str]) -> dict[str, str]:
    def version(package: str) -> str:
        found: Any = msgspec.json.decode((folder / "node_modules" / package / "package.json").read_bytes())
        return str(found["version"])

    return {package: version(package) for package in packages}


def _decoded(data: bytes) -> dict[str, str]:
    return msgspec.json.decode(data, type=dict[str, str])


def _digest(pins: Path) -> str:
    return hashlib.sha256(pins.read_bytes()).hexdigest()


def _is_current(folder: Path, pins: Path) -> bool:
    mark = folder / ".installed"
    return mark.exists() and mark.read_text() == _digest(pins)


def _mark(folder: Path, pins: Path) -> None:
    (folder / ".installed").write_text(_digest(pins))


def _run(command: Sequence[str], doing: str, env: Mapping[str, str] | None = None) -> None:
    print(f"{doing} ...", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False)
    if done.returncode:
        raise InstallFailed(f"{doing}: {done.stdout[-3000:]}")

"""C++ beside the Python that calls it: compiled on first use with the compiler of the machine, and kept in the cache
folder.

It is a plain C interface called through ctypes; its OpenMP is the one that torch has loaded, so there is no second pool
of threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parent  # whose headers every source may include, besides those beside it
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LIBRARIES = ("-lstdc++",)  # CXX may name a compiler of C, which does not link it by itself


class NativeUnavailable(Exception):
    """There is no compiler, or it does not build the source; the message says which."""


def build(source: Path, cache: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """Path of the compiled `source`, compiling it when that was not yet done on this kind of machine. `flags` may deny
    the compiler what the processor has.

    Raises `NativeUnavailable`.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found")
    folder = cache or _cache_folder()
    library = folder / f"{source.stem}-{_identity(source, compiler, flags)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, library, flags)
    return library


def declared(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> "ctypes._NamedFuncPointer":
    """The function `name`, which returns nothing."""
    function: ctypes._NamedFuncPointer = library[name]
    function.argtypes, function.restype = argtypes, None
    return function


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraplex" / "kernels"


def _identity(source: Path, compiler: str, flags: Sequence[str]) -> str:
    """`-march=native` code must not meet another processor: its features are part of the name."""
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    headers = sorted({*SHARED.glob("*.h"), *source.parent.glob("*.h")})
    texts = [path.read_text() for path in (source, *headers)]
    parts = [*texts, compiler, *FLAGS, *flags, *LIBRARIES, features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path, flags: Sequence[str]) -> None:
    """The library appears by one rename, so that two processes may build it at once."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        try:
            subprocess.run(
                [compiler, *FLAGS, *flags, f"-I{SHARED}", str(source), "-o", str(built), *LIBRARIES],
                check=True,
                capture_output=True,
                timeout=120,
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise NativeUnavailable(f"{compiler} does not build {source.name}: {said[:2000]}") from error
        except (OSError, subprocess.SubprocessError) as error:
            raise NativeUnavailable(f"{compiler} does not build {source.name}: {error}") from error
        built.rename(library)

"""C++ beside the Python that calls it: compiled on first use for the form that was chosen (forms.py), and kept in the
cache folder.

The sources have a plain C interface that is called through ctypes. Their OpenMP is the one that torch has loaded, so
there is no second pool of threads.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from adapters.device.forms import Form, NativeUnavailable, chosen_form, compiler

SHARED = Path(__file__).parent  # whose headers every source may include, besides those beside it
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
LIBRARIES = ("-lstdc++",)  # CXX may name a compiler of C, which does not link it by itself


@cache
def load(source: Path) -> ctypes.CDLL:
    """The compiled `source`, in the form that this process uses. Raises `NativeUnavailable`."""
    library = build(source, chosen_form().form)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # for one, a cache folder from which nothing may be executed
        raise NativeUnavailable(f"{library} cannot be loaded: {error}") from error


def build(source: Path, form: Form, cache: Path | None = None) -> Path:
    """Path of `source` compiled for `form`, compiling it when that was not yet done. Raises `NativeUnavailable`."""
    found = compiler()
    if found is None:
        raise NativeUnavailable("no C++ compiler was found")
    folder = cache or _cache_folder()
    library = folder / f"{source.stem}-{form.name}-{_identity(source, found, form)}.so"
    if not library.exists():
        _compile(found, source, library, form)
    return library


def declared(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> "ctypes._NamedFuncPointer":
    """The function `name`, which returns nothing."""
    function: ctypes._NamedFuncPointer = library[name]
    function.argtypes, function.restype = argtypes, None
    return function


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraplex" / "kernels"


def _identity(source: Path, compiler: str, form: Form) -> str:
    headers = sorted({*SHARED.glob("*.h"), *source.parent.glob("*.h")})
    texts = [path.read_text() for path in (source, *headers)]
    parts = [*texts, compiler, *FLAGS, *form.flags, *LIBRARIES, form.machine]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path, form: Form) -> None:
    """The library appears by one rename, so that two processes may build it at once. The compiler's temporary files are
    megabytes: they go beside the library, not to a temporary folder that may be tiny."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, *form.flags, f"-I{SHARED}", str(source), "-o", str(built), *LIBRARIES]
            environment = {**os.environ, "TMPDIR": folder}
            subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
            built.rename(library)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise NativeUnavailable(f"{compiler} does not build {source.name}: {said[:2000]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} does not build {source.name}: {error}") from error

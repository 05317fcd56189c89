"""C++ sources beside the Python that calls them: prebuilt in a wheel, else compiled on first use for the chosen form
(forms.py) and kept in the cache folder.

The sources have a plain C interface that is called through ctypes. They use the OpenMP that torch has loaded, so there
is no second thread pool.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from adapters.device.forms import PREBUILT, Form, NativeUnavailable, chosen_form, compiler

SHARED = Path(__file__).parent  # every source may include its headers, besides those in the source's own folder
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
LIBRARIES = ("-lstdc++",)  # CXX may name a C compiler, which does not link it by itself


@cache
def load(source: Path) -> ctypes.CDLL:
    """Load the compiled `source` in the form that this process uses, compiling it if needed. Raises
    `NativeUnavailable`."""
    library = build(source, chosen_form().form)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # for example, a cache folder mounted with noexec
        raise NativeUnavailable(f"{library} cannot be loaded: {error}") from error


def build(source: Path, form: Form, cache: Path | None = None) -> Path:
    """Return the path of `source` compiled for `form`, compiling it if needed. Raises `NativeUnavailable`."""
    prebuilt = PREBUILT / prebuilt_name(source, form)
    if prebuilt.exists():
        return prebuilt
    found = compiler()
    if found is None:
        raise NativeUnavailable("no C++ compiler was found")
    folder = cache or _cache_folder()
    library = folder / f"{source.stem}-{form.name}-{_identity(source, found, form)}.so"
    if not library.exists():
        _compile(found, source, library, form)
    return library


def prebuilt_name(source: Path, form: Form) -> str:
    """Return where a wheel has the library, within `PREBUILT`. Libraries of other sources have other names."""
    return f"{form.name}/{source.stem}-{_hash([*_texts(source), *FLAGS])}.so"


def declared(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> "ctypes._NamedFuncPointer":
    """Return the library's function `name` with its argument types declared; it returns nothing."""
    function: ctypes._NamedFuncPointer = library[name]
    function.argtypes, function.restype = argtypes, None
    return function


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraplex" / "kernels"


def _identity(source: Path, compiler: str, form: Form) -> str:
    return _hash([*_texts(source), compiler, *FLAGS, *form.flags, *LIBRARIES, form.machine])


def _texts(source: Path) -> list[str]:
    headers = sorted({*SHARED.glob("*.h"), *source.parent.glob("*.h")})
    return [path.read_text() for path in (source, *headers)]


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path, form: Form) -> None:
    """Compile the library and rename it into place, so that two processes may build it at once. The compiler's
    temporary files are megabytes in size: they are written beside the library, not to a temporary folder that may be
    tiny."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, *form.flags, f"-I{SHARED}", str(source), "-o", str(built), *LIBRARIES]
            environment = {**os.environ, "TMPDIR": folder}
            subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
            built.rename(library)
    except subprocess.CalledProcessError as error:
        output = error.stderr.decode(errors="replace").strip()
        raise NativeUnavailable(f"{compiler} does not build {source.name}: {output[:2000]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} does not build {source.name}: {error}") from error

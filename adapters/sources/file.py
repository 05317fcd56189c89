"""`file:///folder`: a folder on the server's own disk."""

import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from adapters.errors import AdapterTooLarge, SourceNotAllowed, SourceNotFound
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.peft.foreign_files import foreign_weights, weights_instead

_CHUNK_BYTES = 1 << 20


def roots(allowed: Sequence[str]) -> list[Path]:
    """Return the folders of the `file:` entries. Raises `SourceNotAllowed` for an entry that is not an absolute
    folder's URL."""
    return [_resolve(_file_url_path(entry), entry) for entry in allowed if entry.startswith("file:")]


def check_source(source: str, allowed: Sequence[str]) -> None:
    """Raise `SourceNotAllowed` unless `source` lies below one of the `allowed` folders."""
    for name in FILES:
        _checked(_file_url_path(source) / name, roots(allowed), source)


def copy(source: str, allowed: Sequence[str], into: Path, max_bytes: int, stop: threading.Event) -> str:
    """Copy the adapter's files and return `source`. Symbolic links are allowed if their targets are."""
    folder, left = _file_url_path(source), max_bytes
    other = foreign_weights(_listed(folder))
    if other is not None:
        raise SourceNotFound(weights_instead(source, other))
    for name in (*FILES, *TOKENIZER_FILES):
        path = _checked(folder / name, roots(allowed), source)
        if name in FILES or os.path.lexists(folder / name):
            with _open(path, source) as reader:
                _check_file(reader, path, roots(allowed), min(left, TOKENIZER_FILES.get(name, left)), source)
                left -= _copy_file(reader, into / name, min(left, TOKENIZER_FILES.get(name, left)))
    return source


def _checked(path: Path, roots: Sequence[Path], source: str) -> Path:
    """Return `path` with all links resolved. Raises `SourceNotAllowed` when the result is below none of `roots`."""
    resolved = _resolve(path, source)
    if not any(resolved.is_relative_to(root) for root in roots):
        raise SourceNotAllowed(
            f"The source {source[:200]!r} is not one that this server may read: a folder, and what its symbolic links "
            "point to, must lie below an --allow-source."
        )
    return resolved


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _file_url_path(url: str) -> Path:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise SourceNotAllowed("The source is not a URL.") from None
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/"):
        raise SourceNotAllowed("A file source must be file:///absolute/folder.")
    return Path(path)


def _resolve(path: Path, source: str) -> Path:
    """Return `path` with all symbolic links followed, existing or not, so that nothing reveals what exists outside
    the roots."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a loop of links, a name too long
        raise _not_found(source) from None


def _not_found(source: str) -> SourceNotFound:
    return SourceNotFound(f"The source {source[:200]!r} does not have {' and '.join(FILES)} to be read.")


def _check_file(reader: BinaryIO, path: Path, roots: Sequence[Path], max_bytes: int, source: str) -> None:
    """Check the opened file before anything is copied. Whoever may write into a folder that clients name could link a
    file of another user there; so such a file has one link, and belongs to the server's user, root or the folder's
    owner."""
    status = os.fstat(reader.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _not_found(source)
    if status.st_size > max_bytes:
        raise _too_large()
    own = {root.stat().st_uid for root in roots if path.is_relative_to(root)} | {os.geteuid(), 0}
    named_by_operator = Path("/") in roots
    if not named_by_operator and (status.st_nlink > 1 or status.st_uid not in own):
        raise SourceNotAllowed(
            f"The source {source[:200]!r} has a file with several hard links or of another user; copy it there."
        )


def _copy_file(reader: BinaryIO, target: Path, max_bytes: int) -> int:
    """Copy one file; returns its size in bytes, which may have grown meanwhile."""
    copied = 0
    with target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            copied += len(chunk)
            if copied > max_bytes:
                raise _too_large()
            writer.write(chunk)
    return copied


def _too_large() -> AdapterTooLarge:
    return AdapterTooLarge("The adapter's files are larger than this server accepts.")


def _open(path: Path, source: str) -> BinaryIO:
    try:
        return open(path, "rb", opener=_open_safely)
    except OSError:
        raise _not_found(source) from None


def _open_safely(path: str, flags: int) -> int:
    """Open without following a link that appeared after `_resolve`, and without waiting for a pipe's writer."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

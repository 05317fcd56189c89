"""Paths as vLLM's `lora_path` has them: a folder, or a repository of the hub."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapters.errors import SourceNotAllowed, SourceNotFound
from adapters.sources import check_source
from adapters.sources.file import roots

_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w.-]+)?", re.ASCII)


def source_of(path: str, allowed: Sequence[str]) -> str:
    """Return the source that `path` means: a source's URL as it is; a folder that is absolute, in the home folder
    (`~`), or relative to the server's folder or to an allowed one; else a repository `org/name` of the hub.

    Only folders below an allowed source are looked at. Raises `SourceNotAllowed`, which names the path as it was sent.
    """
    if "://" in path:
        return path
    folders = [folder for folder in _folders(path, allowed) if _may_read(folder.as_uri(), allowed)]
    there = [folder for folder in folders if os.path.exists(folder)]
    hub = [f"hf://{path}"] if _REPOSITORY.fullmatch(path) and _may_read(f"hf://{path}", allowed) else []
    absent = folders[:1] if path.startswith(("/", "~")) else []
    found = [*(folder.as_uri() for folder in there), *hub, *(folder.as_uri() for folder in absent)]
    if found:
        return found[0]
    raise SourceNotAllowed(
        f"The path {path[:200]!r} is not one that this server may read: start the server with "
        "--allow-source file:///folder for a folder above it, or --allow-source hf://org for a repository org/name."
    )


def _folders(path: str, allowed: Sequence[str]) -> Iterator[Path]:
    try:
        given = Path(path).expanduser()
        yield from dict.fromkeys((given.absolute(), *(root / given for root in roots(allowed))))
    except (RuntimeError, ValueError):  # an unknown user's home, a NUL
        return


def _may_read(source: str, allowed: Sequence[str]) -> bool:
    try:
        check_source(source, allowed)
    except (SourceNotAllowed, SourceNotFound):  # not found: a path that the system cannot read at all
        return False
    return True

"""Atomic creation of adapter folders on the client's side: written completely or not at all. No torch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderError(Exception):
    """A folder or file cannot be read or converted; `str(error)` is one line for the user."""


@contextmanager
def writing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, whose files move into `folder` if the body succeeds; otherwise `folder` is unchanged.

    Raises `FolderError` if `folder` is not empty, unless `replace` allows its files to be overwritten, and if its
    parent is not a folder.
    """
    if folder.exists() and not (folder.is_dir() and (replace or not any(folder.iterdir()))):
        raise FolderError(f"{folder} exists already")
    if not folder.parent.is_dir():
        raise FolderError(f"{folder.parent} is no folder")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".loraplex-") as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)

"""New adapter folders on the client's side: written whole or not at all. No torch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderError(Exception):
    """A folder or file cannot be turned into what was asked for; `str(error)` is one line for the user."""


@contextmanager
def writing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder, whose files move into `folder` when the body ends well; otherwise `folder` stays as it was.

    Raises `FolderError` when `folder` holds anything already, unless `replace` allows to write over its files, and
    when there is no place for it.
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

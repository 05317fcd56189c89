"""Adapter files on disk, keyed by the digest of their content: written once, never changed, shared by all names.

`<root>/<digest[:2]>/<digest>/` holds `adapter_config.json`, `adapter_model.safetensors` and those of `TOKENIZER_FILES`
that the adapter came with, and nothing else. A folder appears there by one rename after its bytes are on disk, so at
any moment a digest is absent or complete.
"""

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import NoSpace
from adapters.peft.files import FILES, TOKENIZER_FILES

_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """The content-addressed folder under `root`. All methods may be called from any thread."""

    def __init__(self, root: Path):
        self._root = root
        self._staging = root / ".staging"
        self._places = threading.Lock()  # held while a folder appears at its place or leaves it
        self._staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        _fsync(root.parent)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A fresh folder to write an adapter into, gone on exit unless it was admitted.

        Raises `NoSpace` when the disk fills up, also from the body of the `with`.
        """
        with _no_space():
            folder = Path(tempfile.mkdtemp(dir=self._staging))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def admit(self, folder: Path, digest: str) -> Path:
        """Make the staged `folder`, an adapter's files, durable and move it to its place; returns that place.

        The same content may be there already: then the staged copy is left for `stage` to remove. Raises `NoSpace`,
        and `FileNotFoundError` when one of the two that every adapter has is missing.
        """
        place = self.path(digest)
        names = (*FILES, *(name for name in TOKENIZER_FILES if (folder / name).exists()))
        if all((place / name).is_file() for name in names):
            return place
        with _no_space():
            for path in (*(folder / name for name in names), folder):
                _fsync(path)
            with self._places:
                if all((place / name).is_file() for name in names):
                    return place
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)  # it lost a file behind our back
                folder.rename(place)
            _fsync(place.parent)
            _fsync(self._root)
        return place

    def path(self, digest: str) -> Path:
        """Where `digest` is, or would be. Raises `ValueError` for anything but 64 hex digits."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest is 64 lowercase hex digits")
        return self._root / digest[:2] / digest

    def __contains__(self, digest: str) -> bool:
        place = self.path(digest)
        return all(os.path.isfile(f"{place}/{name}") for name in FILES)  # a start asks for thousands

    def delete(self, digest: str) -> None:
        """Remove `digest`; nothing happens when it is not there."""
        place = self.path(digest)
        doomed = Path(tempfile.mkdtemp(dir=self._staging))
        with self._places, suppress(FileNotFoundError):
            # Renamed away before removal: a half-removed folder is never at an adapter's place.
            place.rename(doomed / digest)
        shutil.rmtree(doomed, ignore_errors=True)

    def digests(self) -> list[str]:
        """Every digest that has a folder, complete or not."""
        return sorted(path.name for path in self._root.glob("??/*") if _DIGEST.fullmatch(path.name))

    def sweep(self) -> None:
        """Remove what an earlier process left in staging. Call before the first `stage`."""
        for folder in self._staging.iterdir():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("The server has no space left for adapters.") from error
        raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

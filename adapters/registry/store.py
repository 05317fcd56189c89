"""Content-addressed store of adapter files on disk, keyed by digest: written once, never changed, shared by all names.

`<root>/<digest[:2]>/<digest>/` holds `adapter_config.json`, `adapter_model.safetensors` and those of `TOKENIZER_FILES`
that the adapter includes, and nothing else. A folder appears there by one rename after its bytes are on disk, so at any
moment a digest is absent or complete. Files that were damaged later are replaced one by one, each by one rename.
"""

import errno
import filecmp
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import AdapterInvalid, NoSpace
from adapters.fault_points import fault_point
from adapters.peft.digest import digest_of
from adapters.peft.files import CONFIG_FILE, FILES, TOKENIZER_FILES
from adapters.registry.spare_space import check_free_space

Signature = tuple[tuple[str, int, int, int], ...]  # per file: name, inode, size in bytes, modification time in ns

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """The content-addressed folder under `root`. All methods may be called from any thread."""

    def __init__(self, root: Path):
        self._root = root
        self._staging = root / ".staging"
        self._places = threading.Lock()  # held while a digest's folder is renamed into or out of its place
        self._staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        _fsync(root.parent)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield a new folder to write an adapter into; it is removed on exit unless it was committed.

        Raises `NoSpace` when the disk is full, also for writes in the body of the `with`.
        """
        with _no_space():
            check_free_space(self._staging)
            folder = Path(tempfile.mkdtemp(dir=self._staging))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def flush(self, folder: Path) -> None:
        """Start to make a staged folder durable: write its files to disk, so that `commit` has nothing left to write.
        Raises `NoSpace`."""
        with _no_space(), suppress(FileNotFoundError):  # the folder may be no adapter
            for path in (*folder.iterdir(), folder):
                _fsync(path)
            fault_point("store.flushed")

    def commit(self, folder: Path, digest: str) -> Path:
        """Make the staged `folder`, an adapter's files, durable and move it to its place; returns that place.

        If the same content is stored already, the staged copy is left for `stage` to remove. Raises `NoSpace`, and
        `FileNotFoundError` when one of the two files that every adapter has is missing.
        """
        place = self.path(digest)
        names = (*FILES, *(name for name in TOKENIZER_FILES if (folder / name).exists()))
        if all((place / name).is_file() for name in names):
            return place
        with _no_space():
            for path in (*(folder / name for name in names), folder):
                _fsync(path)
            check_free_space(folder)
            fault_point("store.synced")
            with self._places:
                if all((place / name).is_file() for name in names):
                    return place
                is_first = not place.parent.exists()
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)  # an incomplete folder: something else deleted a file
                folder.rename(place)
            fault_point("store.renamed")
            _fsync(place.parent)
            if is_first:
                _fsync(self._root)
        return place

    def heal(self, folder: Path, digest: str) -> bool:
        """Replace the stored files of `digest` by those of the staged `folder`, which have this digest, if the stored
        ones do not have it. Returns True if files were replaced.

        The bytes are compared first, which costs less than a digest; files of other bytes may have the same digest,
        because the order of tensors and the config's whitespace do not count. Raises `NoSpace`.
        """
        place = self.path(digest)
        names = [name for name in (*FILES, *TOKENIZER_FILES) if (folder / name).is_file()]
        if not set(FILES) <= set(names) or self._is_sound(place, folder, names, digest):
            return False
        with _no_space():
            for name in names:
                _fsync(folder / name)
            with self._places:
                place.mkdir(parents=True, exist_ok=True)
                for name in names:
                    os.replace(folder / name, place / name)
                    fault_point("store.healing")
                for path in place.iterdir():
                    if path.name not in names:
                        path.unlink()
            _fsync(place)
        return True

    def _is_sound(self, place: Path, folder: Path, names: list[str], digest: str) -> bool:
        try:
            same = all(filecmp.cmp(folder / name, place / name, shallow=False) for name in names)
            beside = any((place / name).exists() for name in TOKENIZER_FILES if name not in names)
            return (same and not beside) or digest_of(place) == digest
        except (AdapterInvalid, OSError):
            return False
        finally:
            filecmp.clear_cache()  # it knows files by size and time, which damage does not change

    def signature(self, digest: str) -> Signature:
        """Return name, inode, size and modification time of the stored files of `digest`; it changes when `heal`
        replaces them."""
        place, found = self.path(digest), []
        for name in (*FILES, *TOKENIZER_FILES):
            with suppress(FileNotFoundError):
                status = os.stat(place / name)
                found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def path(self, digest: str) -> Path:
        """Return the folder of `digest`, stored or not. Raises `ValueError` for anything but 64 hex digits."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest is 64 lowercase hex digits")
        return self._root / digest[:2] / digest

    def __contains__(self, digest: str) -> bool:
        place = self.path(digest)
        return all(os.path.isfile(f"{place}/{name}") for name in FILES)  # faster than Path: thousands of calls at start

    def delete(self, digest: str) -> None:
        """Remove `digest`, if it is there."""
        place, doomed = self.path(digest), self._staging / f"{digest}-{time.monotonic_ns()}"
        with self._places, suppress(FileNotFoundError):
            # Renamed before removal, so that a partly removed folder is never at an adapter's place. A full disk may
            # have no room for the new name; a folder without its config is absent as well.
            try:
                place.rename(doomed)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                (place / CONFIG_FILE).unlink(missing_ok=True)
                doomed = place
        fault_point("store.deleting")
        shutil.rmtree(doomed, ignore_errors=True)

    def digests(self) -> list[str]:
        """Return every digest that has a folder, complete or not, sorted."""
        return self.digests_in(self._root)

    @staticmethod
    def digests_in(root: Path) -> list[str]:
        """Return every digest that has a folder in the store `root`, which need not exist."""
        return sorted(path.name for path in root.glob("??/*") if _DIGEST.fullmatch(path.name))

    def sweep(self) -> None:
        """Remove staging folders left by an earlier process. Call before the first `stage`."""
        for folder in self._staging.iterdir():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace("The server has no space left for adapters.") from error
        raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Packed copies of stored versions on disk: a cache beside the store, bounded in bytes, which may be deleted any time.

`<root>/<layout>/<digest>` is one file. A layout is everything but the version that decides a file's bytes (see
`adapters.runtime.packed_format`). A file appears by one rename. Its time of modification is that of its last use, and
the files that were unused for the longest time are removed first.
"""

import logging
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapters.fault_points import fault_point

log = logging.getLogger(__name__)

PACKED_FOLDER = "packed"  # in the data folder
MIN_FREE = 1 << 30  # bytes that stay free on the file system, for uploads
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = 0.9  # of the bytes remain when files are removed, so that not every write has to remove some


class PackedFiles:
    """The files of one layout under `root`, and the bound over all layouts. `is_stored` tells whether the store has a
    version. Any thread may call the methods; only one process may write."""

    def __init__(
        self, root: Path, layout: str, max_bytes: int, is_stored: Callable[[str], bool], min_free: int = MIN_FREE
    ) -> None:
        self._root = root
        self._folder = root / layout
        self._max_bytes = max_bytes
        self._is_stored = is_stored
        self._min_free = min_free
        self._accounting = threading.Lock()
        self._nbytes: int | None = None  # of all files at most; None until the first write
        self._has_failed = False

    def open(self, digest: str) -> BinaryIO | None:
        """Return the version's file, unbuffered, and mark it as used; None if there is none, or if the store does not
        have the version."""
        if not self._is_stored(digest):
            return None
        try:
            handle = os.open(self._path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        with suppress(OSError):  # a read-only folder keeps its order
            os.utime(handle)
        return os.fdopen(handle, "rb", buffering=0)

    def write(self, digest: str, parts: Sequence[memoryview]) -> bool:
        """Write the version's file, and remove others to make room for it. Returns False where that is not possible:
        the version keeps being read from its own files."""
        try:
            written = self._write(digest, parts)
        except OSError as error:
            if not self._has_failed:
                log.warning("packed copies of adapters cannot be written, so cold loads stay slow: %s", error)
            self._has_failed = True
            return False
        self._has_failed = self._has_failed and not written
        return written

    def discard(self, digest: str) -> None:
        """Remove the version's file, if there is one."""
        with suppress(OSError):
            self._path(digest).unlink()

    def clear(self) -> None:
        """Remove the files of all layouts."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError("a digest is 64 lowercase hex digits")
        return self._folder / digest

    def _write(self, digest: str, parts: Sequence[memoryview]) -> bool:
        size = sum(part.nbytes for part in parts)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self._make_room(size):
            return False
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(parts)
            fault_point("packed.written")
            os.replace(temporary, self._path(digest))
            fault_point("packed.renamed")
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if not self._is_stored(digest):  # deleted meanwhile, perhaps before this file could be seen
            self.discard(digest)
            return False
        return True

    def _make_room(self, size: int) -> bool:
        """Count `size` bytes, after removing what exceeds the bound; returns False if they do not fit."""
        if size > self._max_bytes:
            return False
        with self._accounting:
            if self._nbytes is None:
                self._remove_leftovers()
            if self._nbytes is None or self._nbytes + size > self._max_bytes:
                self._nbytes = self._evict(self._max_bytes - size)
            disk = os.statvfs(self._root)
            if disk.f_bavail * disk.f_frsize < self._min_free + size:
                return False
            self._nbytes += size
            return True

    def _remove_leftovers(self) -> None:
        """Remove what earlier processes did not finish, and the files of versions that the store has no longer."""
        for path in self._all():
            if not _DIGEST.fullmatch(path.name) or not self._is_stored(path.name):
                with suppress(OSError):
                    path.unlink()

    def _evict(self, target: int) -> int:
        """Remove the files with the oldest use if all together exceed `target` bytes; returns the bytes that remain."""
        found = []
        for path in self._all():
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= target:
            return total
        for _, size, path in sorted(found):
            if total <= target * _FULL:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        for folder in self._root.iterdir():
            with suppress(OSError):  # a layout that still has files
                if folder != self._folder:
                    folder.rmdir()
        return total

    def _all(self) -> Iterator[Path]:
        for folder in self._root.iterdir():
            with suppress(OSError):
                yield from list(folder.iterdir())


def remove_packed(root: Path, digest: str) -> None:
    """Remove the packed copies of a version, of all layouts."""
    with suppress(OSError):
        for folder in list(root.iterdir()):
            with suppress(OSError):
                (folder / digest).unlink()

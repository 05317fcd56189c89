"""Folders for the sockets between the processes, in the folder for temporary files.

A folder is locked while its server lives, so that the next server can tell which ones were left behind by `kill -9`.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = "loraplex-"
_LOCK = "lock"
_NEW_SECONDS = 60.0  # a folder without a lock may be about to get it


class SocketFolder:
    """A private folder, until `remove`."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # mode 0700: other users cannot connect
        self._lock = _open_locked(self.path / _LOCK, os.O_CREAT)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sweep(root: Path) -> None:
    """Remove this user's folders whose server is gone."""
    for folder in root.glob(_PREFIX + "*"):
        with suppress(OSError):
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != os.geteuid():
                continue
            if not (folder / _LOCK).exists():
                if time.time() - status.st_mtime > _NEW_SECONDS and _holds_sockets_alone(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            elif (handle := _open_locked(folder / _LOCK)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _holds_sockets_alone(folder: Path) -> bool:
    """Return whether nothing but sockets is in the folder: one of an earlier version, or of a start that was killed."""
    return all(path.is_socket() for path in folder.iterdir())


def _open_locked(path: Path, flags: int = 0) -> int | None:
    """Open and lock a file; None if another process has locked it."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle

"""Lock that gives a data folder to one process at a time."""

import fcntl
import os
from pathlib import Path

from adapters.errors import AdapterError


class RegistryLocked(AdapterError):
    """Another server uses the data folder; the message names its process."""

    code = "registry_locked"


def lock(path: Path) -> int:
    """Take the exclusive lock on `path` and return the file descriptor; the kernel releases the lock when this process
    ends.

    Raises `RegistryLocked`.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise RegistryLocked(f"The data folder is in use by process {holder}.") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, b"%d\n" % os.getpid(), 0)
    return handle

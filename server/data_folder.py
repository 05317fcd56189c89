"""Preparation of the data folder before anything else starts: it belongs to this server alone."""

import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from adapters.registry.folder_lock import RegistryLocked, lock
from server.config import ConfigError, StartFailed

log = logging.getLogger(__name__)

_ROOT = 0


def prepare(data_dir: Path) -> None:
    """Create the folder, and make it and all files that this process and its children write private.

    Raises `ConfigError` if the folder cannot be used, and `StartFailed` if another server uses it: both before torch is
    imported. The lock itself is taken when the registry is opened.
    """
    os.umask(0o077)
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(data_dir)
        tempfile.TemporaryFile(dir=data_dir).close()
        os.close(lock(data_dir / "lock"))
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir} cannot be written ({error.strerror}); give another folder") from error
    except RegistryLocked as error:
        raise StartFailed(str(error)) from error


def _check_owner(data_dir: Path) -> None:
    """Close the folder to other users. A folder of root may be a volume that is shared with this user's group."""
    status = os.stat(data_dir)
    if status.st_uid not in (os.geteuid(), _ROOT):
        raise ConfigError(
            f"--data-dir {data_dir} belongs to the user {status.st_uid}, who could replace adapters; this server runs "
            f"as {os.geteuid()}; give a folder of its own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        with suppress(PermissionError):
            data_dir.chmod(0o700)
            log.info("%s is now closed to other users", data_dir)

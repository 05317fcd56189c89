"""Disk space that is set aside so that deletion works on a full disk, and space that uploads leave free."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from adapters.errors import NoSpace

T = TypeVar("T")

log = logging.getLogger(__name__)

_SPARE_BYTES = 1 << 20  # what SQLite writes for a deletion is far less
_MOST_FREE_BYTES = 64 << 20
_FREE_SHARE = 50  # one part in so many of the disk stays free, if that is less


class SpareSpace:
    """A file of a data folder that only occupies space, for deletions on a full disk."""

    def __init__(self, data_dir: Path):
        self._path = data_dir / "spare-space"
        self.fill()

    def fill(self) -> None:
        """Occupy the space, unless it is occupied or there is none."""
        if self._path.exists():
            return
        try:
            with self._path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, _SPARE_BYTES)
        except OSError as error:
            log.warning("no disk space could be set aside for deletions: %s", error.strerror)
            self._path.unlink(missing_ok=True)

    def spend_on(self, deletion: Callable[[], T]) -> T:
        """Run a deletion. If the disk is full, run it again in the space that was set aside; raises `NoSpace` if that
        is too little."""
        try:
            return deletion()
        except NoSpace:
            self._path.unlink(missing_ok=True)
            return deletion()


def check_free_space(folder: Path) -> None:
    """Raise `NoSpace` if the disk of `folder` is nearly full: the database, logs and other programs need the rest."""
    usage = shutil.disk_usage(folder)
    if usage.free < min(_MOST_FREE_BYTES, usage.total // _FREE_SHARE):
        raise NoSpace("The server has no space left for adapters.")

"""Addresses of the sockets between the API process and the engine process."""

import os
from functools import cache
from pathlib import Path

LONGEST_SOCKET_PATH = 107  # bytes


def address(folder: Path, name: str) -> str:
    """Return the address of the socket `name` in `folder`. A path that is too long for a socket is replaced by a path
    through a file descriptor."""
    path = f"{folder}/{name}"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        path = f"/proc/self/fd/{_descriptor(folder.parent)}/{folder.name}/{name}"
    return f"ipc://{path}"


@cache
def _descriptor(folder: Path) -> int:
    """Open a folder. The descriptor stays open, because the sockets need it until they close."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

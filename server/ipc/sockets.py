"""Addresses of the sockets between the API's process and the engine's."""

import os
from functools import cache
from pathlib import Path

LONGEST_SOCKET_PATH = 107  # bytes


def address(folder: Path, name: str) -> str:
    """The address of the socket `name` in `folder`. A path that is too long for a socket goes through a descriptor."""
    path = f"{folder}/{name}"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        path = f"/proc/self/fd/{_descriptor(folder.parent)}/{folder.name}/{name}"
    return f"ipc://{path}"


@cache
def _descriptor(folder: Path) -> int:
    """A descriptor that stays open, as the sockets need it to their end."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

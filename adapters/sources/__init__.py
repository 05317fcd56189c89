"""Fetching an adapter from a place that the operator allowed: `file:///folder`, `hf://org/repo@revision[/subfolder]`
and `s3://bucket/prefix`. Credentials and endpoints come from the server's environment alone.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from adapters.errors import SourceNotAllowed
from adapters.sources import file, hub, s3

__all__ = ["check", "check_allowed", "copy_from"]

_SCHEMES = {"file": file, "hf": hub, "s3": s3}


def check(source: str, allowed: Sequence[str]) -> None:
    """Raise `SourceNotAllowed` unless `source` may be fetched; looks at nothing outside this machine."""
    _module(source).check(source, allowed)


def check_allowed(entry: str) -> None:
    """Raise `SourceNotAllowed` unless `entry` of `--allow-source` allows something that can be fetched."""
    _module(entry).roots([entry])


def copy_from(
    source: str, allowed: Sequence[str], into: Path, *, max_bytes: int, stop: threading.Event | None = None
) -> str:
    """Copy the adapter's files at `source` into the folder `into`; returns the source that names these very bytes
    where there is one: a hub's branch has become a commit.

    All files together are at most `max_bytes` bytes. A remote is tried again a few times; `stop` ends the work soon.
    Raises `SourceNotAllowed`, `SourceNotFound`, `SourceUnavailable` or `AdapterTooLarge`; their messages say nothing
    of the server but `source` itself.
    """
    module = _module(source)
    module.check(source, allowed)
    resolved: str = module.copy(source, allowed, into, max_bytes, stop or threading.Event())
    return resolved


def _module(source: str) -> ModuleType:
    scheme, colon, _ = source.partition(":")
    if not colon or scheme not in _SCHEMES:
        raise SourceNotAllowed(f"Sources with the scheme {scheme[:20]!r} are not served; {', '.join(_SCHEMES)} are.")
    return _SCHEMES[scheme]

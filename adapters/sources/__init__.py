"""Fetching of adapters from sources that the operator allowed: `file:///folder`,
`hf://org/repo@revision[/subfolder]` and `s3://bucket/prefix`. Credentials and endpoints come from the server's
environment alone."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from adapters.errors import SourceNotAllowed
from adapters.sources import file, hub, s3

__all__ = ["NAMED_BY_OPERATOR", "check_allow_source", "check_source", "copy_from"]

# The allowed sources for a folder that the operator named on the command line: its links may point anywhere.
NAMED_BY_OPERATOR = ("file:///",)

_SCHEMES = {"file": file, "hf": hub, "s3": s3}


def check_source(source: str, allowed: Sequence[str]) -> None:
    """Raise `SourceNotAllowed` unless `source` may be fetched. The check makes no network request."""
    _module(source).check_source(source, allowed)


def check_allow_source(entry: str) -> None:
    """Raise `SourceNotAllowed` unless `entry`, a value of `--allow-source`, allows a source that can be fetched."""
    if entry.startswith("https:"):
        hub.redirect_hosts([entry])
    else:
        _module(entry).roots([entry])


def copy_from(
    source: str, allowed: Sequence[str], into: Path, *, max_bytes: int, stop: threading.Event | None = None
) -> str:
    """Copy the adapter's files at `source` into the folder `into`; returns the source that identifies exactly these
    bytes where there is one: a branch of a hub is replaced by its commit.

    All files together may have at most `max_bytes` bytes. Failed requests are retried a few times; setting `stop` ends
    the work soon. Raises `SourceNotAllowed`, `SourceNotFound`, `SourceUnavailable` or `AdapterTooLarge`, whose messages
    reveal nothing about the server but `source` itself.
    """
    module = _module(source)
    module.check_source(source, allowed)
    resolved: str = module.copy(source, allowed, into, max_bytes, stop or threading.Event())
    return resolved


def _module(source: str) -> ModuleType:
    scheme, colon, _ = source.partition(":")
    if not colon or scheme not in _SCHEMES:
        raise SourceNotAllowed(f"Sources with the scheme {scheme[:20]!r} are not served; {', '.join(_SCHEMES)} are.")
    return _SCHEMES[scheme]

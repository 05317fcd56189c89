"""Components of the URL of a remote source."""

import re
from collections.abc import Iterable

from adapters.errors import SourceNotAllowed

# Only characters that URLs, hubs and object stores all take literally.
_PART = re.compile(r"[A-Za-z0-9!_.'()=+@,:&$;% -]+")


def parts(url: str, scheme: str) -> tuple[str, ...]:
    """Return the components between the slashes of `scheme://a/b/c`. Raises `SourceNotAllowed` for a URL of another
    form."""
    found = tuple(url.removeprefix(f"{scheme}://").removesuffix("/").split("/"))
    if not url.startswith(f"{scheme}://") or not all(_PART.fullmatch(part) and part.strip(".") for part in found):
        raise SourceNotAllowed(f"The source {url[:200]!r} cannot be read as {scheme}://name/name.")
    return found


def check_under(source: str, place: tuple[str, ...], roots: Iterable[tuple[str, ...]]) -> None:
    """Raise `SourceNotAllowed` unless the components `place` begin with those of a root."""
    if not any(place[: len(root)] == root for root in roots):
        raise SourceNotAllowed(
            f"The source {source[:200]!r} is not one that this server may read; --allow-source allows more."
        )

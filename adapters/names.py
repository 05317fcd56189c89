"""Names of adapters: as the hub writes them (`org/Name`), case-sensitive. A name never becomes a path."""

import re

from adapters.errors import InvalidName

MAX_NAME = 256
# Words that end the path of a route below an adapter: `/v1/adapters/org/name/versions` has one meaning.
ROUTE_WORDS = ("files", "load", "pin", "rollback", "split", "unload", "unpin", "versions")
# Values of the `adapter` label of metrics that stand for no adapter.
METRIC_LABELS = ("_base", "_composed", "_other", "_unknown")
_CHARACTERS = re.compile(r"[A-Za-z0-9._/:-]+")


def check_name(name: str) -> None:
    """Raise `InvalidName` unless `name` is a valid adapter name."""
    first, *rest = name.split("/")
    if not _CHARACTERS.fullmatch(name) or len(name) > MAX_NAME or {"", ".", ".."} & {first, *rest}:
        raise InvalidName(
            f"An adapter's name has 1 to {MAX_NAME} characters of letters, digits, '.', '_', '-', ':' and '/', and no "
            "empty part, '.' or '..' between the slashes."
        )
    if word := next((part for part in rest if part in ROUTE_WORDS), None):
        raise InvalidName(f"After a slash, '{word}' is the end of a route and cannot be part of an adapter's name.")
    if name in METRIC_LABELS:
        raise InvalidName(f"The name '{name}' is a label of the metrics and cannot be an adapter's.")

"""Names of adapters."""

import re

from adapters.errors import InvalidName

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise `InvalidName` unless `name` is a valid adapter name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidName(
            "An adapter's name has 1 to 64 characters of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, "
            "and has no '..'."
        )

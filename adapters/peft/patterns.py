"""PEFT's patterns for module names: dotted endings of a name, or regular expressions. No torch.

Expressions are untrusted: an expression is matched by RE2, in time linear in the name, or it is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

KNOWN_MODULES = 4096  # size of the cache of split names, which all adapters of a base share
MAX_EXPRESSIONS = 64
MAX_EXPRESSION_LENGTH = 1000
# In PEFT a dot matches any character; with dots only between the components of names both readings agree.
_LITERAL = re.compile(r"\^?[A-Za-z0-9_.]+")


class BadPattern(ValueError):
    """The pattern is not supported; the message names what is accepted."""


class ModulePatterns:
    """PEFT's `rank_pattern` or `alpha_pattern`: a map from patterns to numbers, in which the first match counts.

    A lookup among literal names costs the depth of the module's name, independent of the number of patterns.
    """

    def __init__(self, values: Mapping[str, float]):
        """Compile the patterns. Raises `BadPattern` for an expression that RE2 does not accept, or for too many
        expressions."""
        self.values = values
        self._order = {pattern: position for position, pattern in enumerate(values)}
        expressions = [pattern for pattern in values if not _LITERAL.fullmatch(pattern)]
        if len(expressions) > MAX_EXPRESSIONS:
            raise BadPattern(f"at most {MAX_EXPRESSIONS} regular expressions")
        self._expressions = [(pattern, _compiled(pattern, prefix=r"(?:.*\.)?")) for pattern in expressions]

    def get(self, module: str, default: float) -> float:
        """Return the value of the first pattern that matches `module`, or `default`."""
        matches = [name for name in (f"^{module}", *dotted_suffixes(module)) if name in self.values]
        matches += [pattern for pattern, expression in self._expressions if expression.fullmatch(module)]
        return self.values[min(matches, key=self._order.__getitem__)] if matches else default


class ModuleNames:
    """PEFT's `exclude_modules`: dotted endings of names, or one regular expression of whole names."""

    def __init__(self, names: str | Iterable[str]):
        """Compile the names. Raises `BadPattern` for an expression that RE2 does not accept."""
        self._endings = frozenset(() if isinstance(names, str) else names)
        self._expression = _compiled(names) if names and isinstance(names, str) else None

    def __contains__(self, module: str) -> bool:
        if self._expression is not None:
            return bool(self._expression.fullmatch(module))
        return not self._endings.isdisjoint(dotted_suffixes(module))


def layer_of(module: str, lists: Sequence[str]) -> int | None:
    """Return the number of the layer that contains `module`, or None: the first number after one of `lists` (dotted
    endings), or, if `lists` is empty, the first number with at least two name components before it. This is PEFT's
    rule."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    before = {place: dotted_suffixes(".".join(parts[:place])) for place in numbers}
    found = [place for name in lists for place in numbers if name in before[place]]
    found = found if lists else [place for place in numbers if place > 1]
    return int(parts[found[0]]) if found else None


def is_literal(pattern: str) -> bool:
    """Return True if the pattern is a literal name and not an expression."""
    return bool(_LITERAL.fullmatch(pattern)) and not pattern.startswith("^")


@lru_cache(KNOWN_MODULES)
def dotted_suffixes(module: str) -> tuple[str, ...]:
    """Return the names by which PEFT finds a module: for `a.b.c` these are `a.b.c`, `b.c` and `c`."""
    parts = module.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def _compiled(pattern: str, prefix: str = "") -> Any:
    import re2  # few adapters need it

    options = re2.Options()
    options.log_errors = False
    expected = "a name, or a regular expression that RE2 takes (no look-around, no back-references)"
    if not pattern or len(pattern) > MAX_EXPRESSION_LENGTH or not pattern.isprintable():
        raise BadPattern(expected)
    try:
        return re2.compile(f"{prefix}(?:{pattern})", options)
    except re2.error:
        raise BadPattern(expected) from None

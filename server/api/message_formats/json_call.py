"""A function call as a JSON object with a name and arguments, which most formats share."""

import json
import re
from collections.abc import Collection
from typing import Any

from server.api.message_formats.source import Reads, Source

_ARGUMENTS = ("arguments", "parameters")
_KEYS = {"name", "type", "id", "function", *_ARGUMENTS}
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
# All before the arguments, if they come last, as models are asked to write them.
_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    rf'\s*"(?:{"|".join(_ARGUMENTS)})"\s*:\s*(?=\{{)'
)


class ObjectEnd:
    """Finds the end of a JSON object in text that grows."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str, scanned: int = 0) -> int | None:
        """Return where the object ends in `text`, of which `scanned` characters are known; None while it is open."""
        return next((at + 1 for at in range(scanned, len(text)) if self._step(text[at])), None)

    def _step(self, char: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def read_call(source: Source, names: Collection[str] | None = None) -> Reads[bool]:
    """Read a call at the position. Return False, with nothing taken, for anything else, and for a function that is not
    in `names`. Arguments are passed on as they arrive, so nothing after their beginning is taken back."""
    end, scanned = ObjectEnd(), 0
    while source.rest[:1] in ("", "{"):
        head = _HEAD.match(source.rest)
        if head is not None:
            name = _loaded(head[1])
            if not isinstance(name, str) or not _is_known(name, names):
                return False
            source.take(head.end())
            yield source.start_call(name)
            yield from read_arguments(source)
            yield from _skip_end(source)
            return True
        length, scanned = end.find(source.rest, scanned), len(source.rest)
        if length is not None:
            return (yield from _whole_call(source, length, names))
        key = _FIRST_KEY.match(source.rest)
        if source.ended or (key is not None and key[1] not in _KEYS):
            return False
        yield None
    return False


def read_arguments(source: Source) -> Reads[None]:
    """Yield a JSON object in pieces, as the text of a call's arguments."""
    end = ObjectEnd()
    while True:
        length = end.find(source.text)
        text = source.take(len(source.text) if length is None else length)
        if text:
            yield source.arguments(text)
        if length is not None or source.ended:
            return
        yield None


def _skip_end(source: Source) -> Reads[None]:
    """Take the end of a call's object after the arguments, with further keys if there are any."""
    while True:
        rest = source.rest.lstrip()
        space = len(source.rest) - len(rest)
        if rest.startswith("}"):
            source.take(space + 1)
            return
        end = ObjectEnd()
        length = end.find("{" + rest) if rest.startswith(",") else None
        if length is not None:
            source.take(space + length - 1)
            return
        if source.ended or (rest and not rest.startswith(",")):
            return
        yield None


def _whole_call(source: Source, length: int, names: Collection[str] | None) -> Reads[bool]:
    """Read a call whose arguments are not where `_HEAD` expects them."""
    call = _loaded(source.rest[:length])
    if not isinstance(call, dict):
        return False
    if isinstance(call.get("function"), dict):
        call = call["function"]
    name = call.get("name")
    arguments: Any = next((call[key] for key in _ARGUMENTS if key in call), {})
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict) or not _is_known(name, names):
        return False
    source.take(length)
    yield source.start_call(name)
    yield source.arguments(json.dumps(arguments, ensure_ascii=False))
    return True


def _is_known(name: str, names: Collection[str] | None) -> bool:
    return bool(name) and (names is None or name in names)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

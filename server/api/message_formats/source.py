"""Text that arrives in parts, and what all formats read from it.

A format is a generator over a `Source`. It yields pieces, and None when the text so far does not decide how to go on,
so the pieces do not depend on how the text is divided.
"""

import uuid
from collections.abc import Callable, Generator
from typing import TypeVar

from server.api.message_formats.pieces import Arguments, CallStart, Content, Piece, Reasoning

T = TypeVar("T")
Reads = Generator[Piece | None, None, T]  # yields pieces or None, and returns a T


class Source:
    """The text that no piece has taken yet, and a position in it to which readers look ahead."""

    def __init__(self, id_length: int | None = None):
        """Calls get ids of `id_length` characters; by default they look like OpenAI's."""
        self.text = ""
        self.position = 0
        self.ended = False
        self.num_calls = 0
        self.space = ""  # that `read_until` dropped before the last mark
        self._id_length = id_length

    @property
    def rest(self) -> str:
        return self.text[self.position :]

    def take(self, length: int = 0) -> str:
        """Return and drop the text up to the position and `length` characters more."""
        end = self.position + length
        taken, self.text, self.position = self.text[:end], self.text[end:], 0
        return taken

    def start_call(self, name: str) -> CallStart:
        unique = uuid.uuid4().hex
        self.num_calls += 1
        id = f"call_{unique[:24]}" if self._id_length is None else unique[: self._id_length]
        return CallStart(self.num_calls - 1, id, name)

    def arguments(self, text: str) -> Arguments:
        return Arguments(self.num_calls - 1, text)


def accept(source: Source, literal: str) -> Reads[bool]:
    """Move past `literal` if it comes next."""
    while not source.rest.startswith(literal):
        if source.ended or not literal.startswith(source.rest):
            return False
        yield None
    source.position += len(literal)
    return True


def skip_space(source: Source) -> Reads[None]:
    """Move to the next character that is not white space."""
    while True:
        source.position = len(source.text) - len(source.rest.lstrip())
        if source.ended or source.position < len(source.text):
            return
        yield None


def read_until(source: Source, marks: tuple[str, ...], piece: Callable[[str], Piece]) -> Reads[str]:
    """Yield the text before the first of `marks` in pieces, and return the mark, which is taken; "" at the end. White
    space before a mark is dropped."""
    while True:
        found = [(at, mark) for mark in marks if (at := source.text.find(mark)) >= 0]
        at, mark = min(found, default=(len(source.text) if source.ended else _undecided(source.text, marks), ""))
        text = source.take(at)
        kept = text.rstrip() if mark else text
        source.space = text[len(kept) :]
        if kept:
            yield piece(kept)
        if mark or source.ended:
            source.take(len(mark))
            return mark
        yield None


def _undecided(text: str, marks: tuple[str, ...]) -> int:
    """Return where the end of the text begins that may belong to a mark, or to the white space before one."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    tails = (len(text) - length for length in range(longest, 0, -1))
    start = next((at for at in tails if any(mark.startswith(text[at:]) for mark in marks)), len(text))
    return len(text[:start].rstrip())


def read_rest(source: Source) -> Reads[None]:
    """Yield what is left as content."""
    yield from read_until(source, (), Content)


def content_until(source: Source, *marks: str) -> Reads[str]:
    return (yield from read_until(source, marks, Content))


def reasoning_until(source: Source, *marks: str) -> Reads[str]:
    return (yield from read_until(source, marks, Reasoning))

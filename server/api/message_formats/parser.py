"""The format of a chat's output, chosen by the chat template, and the parser of one message."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from server.api.message_formats import harmony, hermes, json_calls, mistral
from server.api.message_formats import reasoning as thinking
from server.api.message_formats.pieces import Arguments, CallStart, Piece, Reasoning
from server.api.message_formats.source import Reads, Source, read_rest


class CallFormat(NamedTuple):
    """`marks` may be special tokens, which then have to be shown in the text that is parsed."""

    read: Callable[[Source, Collection[str]], Reads[None]]
    marks: tuple[str, ...] = ()
    id_length: int | None = None


# The first text that the template has in it decides.
_FORMATS = {
    harmony.CHANNEL: CallFormat(harmony.harmony, harmony.MARKS),
    mistral.OPEN: CallFormat(mistral.mistral, (mistral.OPEN, mistral.ARGS), mistral.ID_LENGTH),
    hermes.OPEN: CallFormat(hermes.hermes, (hermes.OPEN, hermes.CLOSE)),
}
_OTHERS = CallFormat(json_calls.json_calls, (json_calls.TAG,))
BY_NAME = {
    "harmony": _FORMATS[harmony.CHANNEL],
    "hermes": _FORMATS[hermes.OPEN],
    "json": _OTHERS,
    "mistral": _FORMATS[mistral.OPEN],
}


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How to read the messages of one request. `calls` is None if it offers no functions."""

    calls: CallFormat | None
    names: frozenset[str] = frozenset()
    several_calls: bool = True
    has_reasoning: bool = False
    begins_in_reasoning: bool = False
    shows_reasoning: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        thinking_marks = (thinking.OPEN, thinking.CLOSE) if self.has_reasoning else ()
        return (*thinking_marks, *(self.calls.marks if self.calls else ()))

    def read(self, source: Source) -> Reads[None]:
        if self.has_reasoning:
            yield from thinking.reasoning(source, begun=self.begins_in_reasoning)
        yield from (self.calls.read(source, self.names) if self.calls else read_rest(source))


def call_format(template: str, name: str | None = None) -> CallFormat:
    """Return the format of a template, "" for none, unless `name` is another one's."""
    if template and name is not None:
        return BY_NAME[name]
    return next((found for mark, found in _FORMATS.items() if mark in template), _OTHERS)


def writes_channels(template: str) -> bool:
    """Return whether every output has channels, also without functions."""
    return harmony.CHANNEL in template


def marks_reasoning(template: str) -> bool:
    return thinking.CLOSE in template


def ends_in_reasoning(prompt: str) -> bool:
    return prompt.rstrip().endswith(thinking.OPEN)


class MessageParser:
    """Turns the text of one message into pieces."""

    def __init__(self, format: MessageFormat):
        self._format = format
        self._source = Source(format.calls.id_length if format.calls else None)
        self._reads = format.read(self._source)

    @property
    def has_calls(self) -> bool:
        return self._source.num_calls > 0

    def feed(self, text: str, *, end: bool = False) -> list[Piece]:
        """Return the pieces that `text` completes, and with `end` all that are left."""
        self._source.text += text
        self._source.ended = end
        found = []
        for piece in self._reads:
            if piece is None:
                break
            if self._is_wanted(piece):
                found.append(piece)
        return found

    def _is_wanted(self, piece: Piece) -> bool:
        if isinstance(piece, CallStart | Arguments):
            return self._format.several_calls or piece.index == 0
        return self._format.shows_reasoning or not isinstance(piece, Reasoning)

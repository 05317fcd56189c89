"""Llama 3, and models without marks of their own: an output that begins with calls as JSON objects, alone or in an
array or a code block, or calls after `<|python_tag|>`."""

from collections.abc import Collection

from server.api.message_formats.json_call import read_call
from server.api.message_formats.pieces import Content
from server.api.message_formats.source import Reads, Source, accept, content_until, skip_space

TAG = "<|python_tag|>"
_OPENINGS, _SEPARATORS, _CLOSINGS = ("```json", "```", "["), (";", ","), ("]", "```")


def json_calls(source: Source, names: Collection[str]) -> Reads[None]:
    """Without the tag, a JSON object is a call only if it names a function of the request."""
    yield from _calls(source, names)
    while (yield from content_until(source, TAG)):
        before = source.num_calls
        yield from _calls(source, None)
        if source.num_calls == before:
            yield Content(source.space + TAG)


def _calls(source: Source, names: Collection[str] | None) -> Reads[None]:
    """Read calls up to something else, which is left."""
    yield from skip_space(source)
    if names is not None and (yield from accept(source, TAG)):
        names = None
    yield from _skip(source, _OPENINGS)
    found = False
    while (yield from read_call(source, names)):
        found = True
        yield from _skip(source, _SEPARATORS)
    if found:
        yield from _skip(source, _CLOSINGS)
        source.take()
    source.position = 0


def _skip(source: Source, literals: tuple[str, ...]) -> Reads[None]:
    """Move past white space, and past each of `literals` that comes next in this order."""
    yield from skip_space(source)
    for literal in literals:
        if (yield from accept(source, literal)):
            yield from skip_space(source)

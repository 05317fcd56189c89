"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and in newer models `[TOOL_CALLS]name[ARGS]{…}`."""

import re
from collections.abc import Collection

from server.api.message_formats.json_call import read_arguments, read_call
from server.api.message_formats.pieces import Content
from server.api.message_formats.source import Reads, Source, accept, content_until, skip_space

OPEN, ARGS = "[TOOL_CALLS]", "[ARGS]"
ID_LENGTH = 9  # of a call's id, which templates check
_NAMED = re.compile(r"([\w.:/-]{1,256})(\[ARGS\])?\s*(?=\{)", re.ASCII)
_NAME_PREFIX = re.compile(r"[\w.:/-]{0,256}(\[(A(R(G(S(\]\s*)?)?)?)?)?)?\Z|[\w.:/-]{1,256}\s*\Z", re.ASCII)


def mistral(source: Source, names: Collection[str]) -> Reads[None]:
    while (yield from content_until(source, OPEN)):
        before = source.num_calls
        yield from skip_space(source)
        yield from _array(source)
        if source.num_calls == before and not (yield from _named(source)):
            source.position = 0
            yield Content(source.space + OPEN)


def _array(source: Source) -> Reads[None]:
    start = source.position
    if not (yield from accept(source, "[")):
        return
    yield from skip_space(source)
    found = False
    while (yield from read_call(source)):
        found = True
        yield from skip_space(source)
        if (yield from accept(source, ",")):
            yield from skip_space(source)
    if found:
        if (yield from accept(source, "]")):
            yield from skip_space(source)
        source.take()
    else:
        source.position = start


def _named(source: Source) -> Reads[bool]:
    while (head := _NAMED.match(source.rest)) is None:
        if source.ended or not _NAME_PREFIX.match(source.rest):
            return False
        yield None
    source.take(head.end())
    yield source.start_call(head[1])
    yield from read_arguments(source)
    yield from skip_space(source)
    source.take()
    return True

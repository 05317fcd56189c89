"""Hermes, Qwen and others: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from collections.abc import Collection

from server.api.message_formats.json_call import read_call
from server.api.message_formats.pieces import Content
from server.api.message_formats.source import Reads, Source, accept, content_until, skip_space

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def hermes(source: Source, names: Collection[str]) -> Reads[None]:
    while (yield from content_until(source, OPEN)):
        yield from skip_space(source)
        if not (yield from read_call(source)):
            source.position = 0
            yield Content(source.space + OPEN)
            continue
        yield from skip_space(source)
        if (yield from accept(source, CLOSE)):
            yield from skip_space(source)
        source.take()

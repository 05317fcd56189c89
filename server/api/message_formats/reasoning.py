"""Reasoning between `<think>` and `</think>` at the beginning of the output."""

from server.api.message_formats.source import Reads, Source, accept, reasoning_until, skip_space

OPEN, CLOSE = "<think>", "</think>"


def reasoning(source: Source, *, begun: bool) -> Reads[None]:
    """Read reasoning, if there is any. With `begun`, the prompt ends within it."""
    yield from skip_space(source)
    if not (yield from accept(source, OPEN)) and not begun:
        source.position = 0
        return
    yield from skip_space(source)
    source.take()
    yield from reasoning_until(source, CLOSE)
    yield from skip_space(source)
    source.take()

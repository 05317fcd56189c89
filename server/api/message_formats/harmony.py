"""gpt-oss: messages in channels, `<|channel|>commentary to=functions.NAME <|message|>{…}<|call|>`. The channel
`analysis` is reasoning."""

import re
from collections.abc import Collection

from server.api.message_formats.pieces import Content, Reasoning
from server.api.message_formats.source import Reads, Source, accept, read_until

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (CHANNEL, MESSAGE, START, "<|constrain|>", *_ENDS)
_FIRST_RECIPIENT = " to=functions."  # of an output whose `<|start|>assistant` is in the prompt
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


def harmony(source: Source, names: Collection[str]) -> Reads[None]:
    """Read messages: each a header, from its channel to its text, and the text up to an end."""
    while not source.ended or source.text:
        yield from _skip_start(source)
        if not (yield from accept(source, CHANNEL)):
            yield from read_until(source, _ENDS, Content)
        else:
            source.take()
            yield from _message(source)


def _skip_start(source: Source) -> Reads[None]:
    """Take `<|start|>assistant`, and a recipient that stands there, which belongs to the header after it."""
    if (yield from accept(source, START)):
        source.take()
    elif not (yield from accept(source, _FIRST_RECIPIENT)):
        return
    source.position = 0
    while CHANNEL not in source.text:
        if source.ended:
            return
        yield None
    before, _, after = source.text.partition(CHANNEL)
    source.text = f"{CHANNEL}{before} {after}"


def _message(source: Source) -> Reads[None]:
    while MESSAGE not in source.text:
        if source.ended:
            source.take(len(source.text))
            return
        yield None
    header, _, source.text = source.text.partition(MESSAGE)
    called = _RECIPIENT.search(header)
    if called is not None:
        yield source.start_call(called[1])
        yield from read_until(source, _ENDS, source.arguments)
    else:
        yield from read_until(source, _ENDS, Reasoning if "analysis" in header else Content)

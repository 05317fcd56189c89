"""Outputs that are a list of blocks: reasoning, text and calls in the order in which the model wrote them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from server.api.errors import ApiError
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.generation import Generation
from server.api.message_formats.parser import MessageFormat, MessageParser
from server.api.message_formats.pieces import CallStart, Content, Piece, Reasoning
from server.api.schemas import Wire

Event = dict[str, Any]  # with its `type`


@dataclass(slots=True)
class Block:
    """`text` is that of a call's arguments, if the block is a call, which has an id and a name. `scores` are those of a
    text's tokens, if they were asked for."""

    index: int
    kind: Literal["text", "reasoning", "call"]
    text: str = ""
    id: str = ""
    name: str = ""
    scores: list[TokenScore] = field(default_factory=list)


class BlockFormatter(ABC):
    """The output of one choice as events that begin, extend and end blocks, or as a body with the blocks."""

    def __init__(self, generation: Generation):
        self._generation = generation
        self._blocks: list[Block] = []
        self._parser = MessageParser(generation.plan.output.message_format or MessageFormat(calls=None))
        self._end = Delta(0)  # has the finish reason in the end
        self._scores: list[TokenScore] = []  # of tokens whose text is still to come; only if all of it is one text

    @abstractmethod
    def whole(self) -> Wire:
        """Return the body, once the output is complete."""

    @abstractmethod
    def first_events(self) -> Iterator[Event]: ...

    @abstractmethod
    def started(self, block: Block) -> Iterator[Event]: ...

    @abstractmethod
    def grown(self, block: Block, text: str, scores: list[TokenScore]) -> Iterator[Event]: ...

    @abstractmethod
    def ended(self, block: Block) -> Iterator[Event]: ...

    @abstractmethod
    def last_events(self) -> Iterator[Event]: ...

    @abstractmethod
    def failure(self, error: ApiError) -> bytes: ...

    def body(self, deltas: list[Delta]) -> Wire:
        (delta,) = deltas
        for _ in self._events(delta):
            pass
        return self.whole()

    def opening(self) -> bytes:
        return self._encoded(self.first_events())

    def has_event(self, delta: Delta) -> bool:
        return bool(delta.text or delta.finish_reason)

    def event(self, delta: Delta) -> bytes:
        return self._encoded(self._events(delta))

    def ending(self) -> bytes:
        return self._encoded(self.last_events())

    def _encoded(self, events: Iterator[Event]) -> bytes:
        return b"".join(
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event)) for event in events
        )

    def _events(self, delta: Delta) -> Iterator[Event]:
        self._scores += delta.scores
        for piece in self._parser.feed(delta.text, end=delta.finish_reason is not None):
            yield from self._extend(piece)
        if delta.finish_reason is not None:
            self._end = delta
            if self._blocks:
                self._blocks[-1].scores += self._scores  # of last tokens without text
                yield from self.ended(self._blocks[-1])

    def _extend(self, piece: Piece) -> Iterator[Event]:
        kind: Literal["text", "reasoning", "call"]
        kind = "text" if isinstance(piece, Content) else "reasoning" if isinstance(piece, Reasoning) else "call"
        if isinstance(piece, CallStart) or not self._blocks or self._blocks[-1].kind != kind:
            if self._blocks:
                yield from self.ended(self._blocks[-1])
            self._blocks.append(Block(len(self._blocks), kind))
            if isinstance(piece, CallStart):
                self._blocks[-1].id, self._blocks[-1].name = piece.id, piece.name
            yield from self.started(self._blocks[-1])
        if not isinstance(piece, CallStart):
            self._blocks[-1].text += piece.text
            scores, self._scores = self._scores, []
            self._blocks[-1].scores += scores
            yield from self.grown(self._blocks[-1], piece.text, scores)

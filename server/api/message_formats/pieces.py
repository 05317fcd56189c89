"""The pieces of an assistant's message, in the order in which the model writes them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a function call. `index` counts the calls of the message."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Some text of a call's arguments, which together are a JSON object."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | Arguments

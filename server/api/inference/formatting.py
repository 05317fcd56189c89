"""The wire format of an endpoint's output, whole or as events; what chat completions and completions have in common."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import msgspec

from server.api.errors import ApiError, error_body
from server.api.inference.choices import Delta
from server.api.inference.generation import Generation
from server.api.schemas import ResponseHead, Wire

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


class Formatter(Protocol):
    """Turns the output of one generation into a body or into events. One instance serves one request and may keep
    state."""

    def body(self, deltas: list[Delta]) -> Wire:
        """Return the body of a response that is not streamed, from the whole output of each choice."""

    def opening(self) -> bytes:
        """Return the events before the first output."""

    def event(self, delta: Delta) -> bytes: ...

    def ending(self) -> bytes:
        """Return the events after the last output."""

    def failure(self, error: ApiError) -> bytes:
        """Return the events that end a stream which failed after it began."""


class ChoicesFormatter(ABC):
    """The format of OpenAI's completions: a head, choices and the usage. Everything in an event but its choice is
    encoded once."""

    body_model: ClassVar[type[ResponseHead]]
    chunk_model: ClassVar[type[ResponseHead]]

    def __init__(self, generation: Generation):
        self._generation = generation
        plan = generation.plan
        self._tokenizer = plan.tokenizer
        self._with_logprobs = plan.sampling.logprobs is not None
        self._event_head = b"data: " + _encode(self._head(self.chunk_model))[:-1] + b',"choices":['
        self._event_tail = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"

    @abstractmethod
    def choice(self, delta: Delta) -> dict[str, Any]:
        """Return a choice of the body."""

    @abstractmethod
    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        """Return the choice of an event."""

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        """Return the choice of an event before the first output; None for no such event."""
        return None

    def body(self, deltas: list[Delta]) -> Wire:
        choices = [self.choice(delta) for delta in deltas]
        usage = self._generation.usage()
        return self.body_model.model_validate({**self._head(self.body_model), "choices": choices, "usage": usage})

    def opening(self) -> bytes:
        choices = map(self.opening_choice, range(len(self._generation)))
        given = [_encode(choice) for choice in choices if choice is not None]
        return b"".join(self._event_head + choice + self._event_tail for choice in given)

    def event(self, delta: Delta) -> bytes:
        return self._event_head + _encode(self.chunk_choice(delta)) + self._event_tail

    def ending(self) -> bytes:
        if not self._generation.plan.include_usage:
            return _DONE
        usage = _encode(self._generation.usage().model_dump())
        return self._event_head + b'],"usage":' + usage + b"}\n\n" + _DONE

    def failure(self, error: ApiError) -> bytes:
        body = error_body(error.status_code, str(error.detail), code=error.code, param=error.param)
        return b"data: " + _encode(body) + b"\n\n" + _DONE

    def _head(self, model: type[ResponseHead]) -> dict[str, Any]:
        target = self._generation.plan.target
        return {
            "id": self._generation.id,
            "object": model.model_fields["object"].default,
            "created": self._generation.created,
            "model": target.requested_model,
            "system_fingerprint": target.fingerprint,
        }

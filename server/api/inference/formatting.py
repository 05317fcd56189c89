"""The wire format of an endpoint's output, whole or as events; what chat completions and completions have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import msgspec

from server.api.errors import ApiError, error_body
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.generation import Generation
from server.api.inference.receipts import completed_receipt
from server.api.schemas import ResponseHead, Wire
from server.api.text.tokenizer import Tokenizer, finite
from server.request import TokenLogprobs

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


def score_body(score: TokenScore, token: Callable[[int, float], dict[str, Any]]) -> dict[str, Any]:
    """Return the log-probabilities of a chat's token in OpenAI's format; `token` returns one of its tokens."""
    assert score.logprobs is not None  # a chat does not echo its prompt
    top = [token(token_id, logprob) for token_id, logprob in score.logprobs.top]
    return token(score.token_id, score.logprobs.logprob) | {"top_logprobs": top}


def token_body(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """Return a token with its log-probability in OpenAI's format."""
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


class Formatter(Protocol):
    """Turns the output of one generation into a body or into events. One instance serves one request and may keep
    state."""

    def body(self, deltas: list[Delta]) -> Wire:
        """Return the body of a response that is not streamed, from the whole output of each choice."""

    def opening(self) -> bytes:
        """Return the events before the first output."""

    def has_event(self, delta: Delta) -> bool:
        """Return whether `delta` has anything to say yet."""

    def event(self, delta: Delta) -> bytes:
        """Return the events of `delta`; none while its text does not decide how to go on."""

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
        self._show_token_ids = plan.output.token_ids
        self._tokens_as_ids = plan.output.tokens_as_ids
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
        head = {**self._head(self.body_model), **self.body_fields(deltas), **self._receipt(deltas)}
        return self.body_model.model_validate({**head, "choices": choices, "usage": usage})

    def _receipt(self, deltas: list[Delta]) -> dict[str, Any]:
        begun = self._generation.plan.output.receipt
        return {} if begun is None else {"receipt": completed_receipt(begun, deltas)}

    def body_fields(self, deltas: list[Delta]) -> dict[str, Any]:
        """Return fields of the body that an endpoint has beside its choices."""
        return {}

    def opening(self) -> bytes:
        choices = map(self.opening_choice, range(len(self._generation)))
        given = [_encode(choice) for choice in choices if choice is not None]
        return b"".join(self._event_head + choice + self._opening_tail() for choice in given)

    def _opening_tail(self) -> bytes:
        """Return the end of an event before the first output."""
        return self._tail()

    def event(self, delta: Delta) -> bytes:
        return self._event_head + _encode(self.chunk_choice(delta)) + self._tail()

    def _tail(self) -> bytes:
        if not self._generation.plan.output.continuous_usage:
            return self._event_tail
        return b'],"usage":' + _encode(self._generation.usage().model_dump()) + b"}\n\n"

    def has_event(self, delta: Delta) -> bool:
        """Return whether there is anything to say yet; text may be held back that begins a stop string."""
        return bool(delta.text or delta.scores or delta.finish_reason or (self._show_token_ids and delta.token_ids))

    def _token_ids(self, delta: Delta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids, "token_versions": delta.versions} if self._show_token_ids else {}

    def _prompt_logprobs(self, prompt: list[int], delta: Delta) -> dict[str, Any]:
        """Return the log-probabilities of a prompt in vLLM's format, if they were asked for."""
        num_top = self._generation.plan.output.prompt_logprobs
        if num_top is None:
            return {}
        scored = zip(prompt[1:], delta.prompt_logprobs or [], strict=True)
        return {"prompt_logprobs": [None, *(self._position(token, each, num_top) for token, each in scored)]}

    def _position(self, token_id: int, logprobs: TokenLogprobs, num_top: int) -> dict[str, Any]:
        ranked = [(token, value, rank) for rank, (token, value) in enumerate(logprobs.top[:num_top], 1)]
        tokens = {token: (value, rank) for token, value, rank in ranked} | {token_id: (logprobs.logprob, logprobs.rank)}
        return {
            str(token): {"logprob": finite(value), "rank": rank, "decoded_token": self._text(token)}
            for token, (value, rank) in tokens.items()
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _name(self, token_id: int) -> str:
        """Return a token as log-probabilities name it: by its text, or by its id."""
        return f"token_id:{token_id}" if self._tokens_as_ids else self._text(token_id)

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

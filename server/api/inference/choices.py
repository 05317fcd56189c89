"""The choices of a response: one sequence each, whose tokens become text."""

from dataclasses import dataclass, field
from typing import Literal

from server.api.text.tokenizer import Detokenizer
from server.ipc.messages import SequenceOutput
from server.sequence import TokenLogprobs


@dataclass(slots=True)
class TokenScore:
    """A generated token with its log-probabilities and the offset of its text in the choice's text."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Delta:
    """New output of one choice since the previous delta: usually one token, more if the reader lags."""

    index: int
    text: str = ""
    num_tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def extend(self, delta: "Delta") -> None:
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.scores += delta.scores
        self.finish_reason = delta.finish_reason


class Choice:
    """One sequence and the state of its text."""

    def __init__(self, index: int, detokenizer: Detokenizer, stop_ids: frozenset[int]):
        self.index = index
        self.finished = False
        self.num_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids

    def absorb(self, output: SequenceOutput, delta: Delta) -> None:
        """Add `output` to `delta`. Raises `EngineFailure` if the sequence was aborted, refused or failed."""
        reason = output.finish_reason
        if reason is not None and reason != "stop" and reason != "length":
            self.finished = True
            raise EngineFailure(reason, output.error)
        self.cached_tokens, self.queue_seconds = output.num_cached_tokens, output.queue_seconds
        text_ends = output.finish_reason == "stop" and output.token_ids and output.token_ids[-1] in self._stop_ids
        for i, token_id in enumerate(output.token_ids):
            delta.num_tokens += 1
            self.num_tokens += 1
            if text_ends and i == len(output.token_ids) - 1:
                break  # the token that ended the sequence is counted but is not part of the text
            if output.logprobs is not None:
                delta.scores.append(TokenScore(token_id, output.logprobs[i], self._detokenizer.decoded_chars))
            delta.text += self._detokenizer.feed(token_id)
            if self._detokenizer.stopped:
                self._finish(delta, "stop")
                return
        if reason is not None:
            delta.text += self._detokenizer.flush()
            self._finish(delta, reason)

    def _finish(self, delta: Delta, reason: Literal["stop", "length"]) -> None:
        self.finished = True
        delta.finish_reason = reason


class EngineFailure(Exception):
    """The engine aborted or refused a sequence, or failed to compute it."""

    def __init__(self, reason: str, message: str | None):
        super().__init__(message or reason)
        self.reason = reason
        self.message = message

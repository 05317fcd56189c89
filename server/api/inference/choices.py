"""The choices of a response: one sequence each, whose tokens become text."""

from dataclasses import dataclass, field
from typing import Literal

from server.api.text.detokenizer import Detokenizer
from server.api.text.tokenizer import Tokenizer
from server.ipc.messages import SequenceOutput
from server.request import TokenLogprobs
from server.version_labels import BASE_LABEL, version_label

# The engine's reasons that end an output without an error, in the words of a response.
_ENDS: dict[str, Literal["stop", "length", "abort"]] = {"stop": "stop", "length": "length", "stopped": "abort"}


@dataclass(slots=True)
class TokenScore:
    """A token with its log-probabilities and the offset of its text in the choice's text. The first token of a prompt
    has no log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that a choice's text begins with. `offsets` are those of its tokens in `text`."""

    token_ids: list[int]
    text: str
    offsets: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, token_ids: list[int], text: str | None) -> "EchoedPrompt":
        """`text` is the prompt as it was sent; None if it was sent as token ids, of which special ones are shown."""
        detokenizer = Detokenizer(tokenizer, [], skip_special=text is not None)
        offsets, shown = [], []
        for token_id in token_ids:
            offsets.append(detokenizer.decoded_chars)
            shown.append(detokenizer.feed(token_id))
        return cls(token_ids, "".join([*shown, detokenizer.flush()]) if text is None else text, offsets)

    def scores(self, logprobs: list[TokenLogprobs], num_top: int) -> list[TokenScore]:
        known = [None, *(TokenLogprobs(each.logprob, each.rank, each.top[:num_top]) for each in logprobs)]
        found = zip(self.token_ids, known, self.offsets, strict=True)
        return [TokenScore(token_id, each, offset) for token_id, each, offset in found]


@dataclass(slots=True)
class Delta:
    """New output of one choice since the previous delta: usually one token, more if the reader lags. `token_ids` has
    the token that ended the sequence, whose text is left out."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)  # the label of the version that computed each of `token_ids`
    finish_reason: Literal["stop", "length", "abort"] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt's second token and later ones
    embedding: bytes | None = None  # of the prompt, float32
    stop_string: str | None = None  # that ended the output

    @property
    def is_cut(self) -> bool:
        """True if the output ended before the model would have ended it."""
        return self.finish_reason in ("length", "abort")

    def extend(self, delta: "Delta") -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.versions += delta.versions
        self.scores += delta.scores
        self.finish_reason = delta.finish_reason
        self.stop_string = delta.stop_string
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.embedding = self.embedding or delta.embedding


class Choice:
    """One sequence and the state of its text. Without `include_stop`, a token of `stop_ids` that ends the sequence is
    not part of the text. `num_logprobs` is None if no log-probabilities are wanted. `version` is the label of what
    computes the tokens, until an output has other adapters. With `scores_end`, the log-probabilities have those of the
    token that ended the sequence, so that they are as many as the token ids."""

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stop_ids: frozenset[int],
        *,
        include_stop: bool = False,
        echo: EchoedPrompt | None = None,
        num_logprobs: int | None = None,
        version: str = BASE_LABEL,
        scores_end: bool = False,
    ):
        self.index = index
        self.finished = False
        self.num_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self._detokenizer = detokenizer
        self._stop_ids = frozenset() if include_stop else stop_ids
        self._echo = echo  # until the first output
        self._num_logprobs = num_logprobs
        self._version = version
        self._scores_end = scores_end
        self._text_start = len(echo.text) if echo else 0

    def absorb(self, output: SequenceOutput, delta: Delta) -> None:
        """Add `output` to `delta`. Raises `EngineFailure` if the sequence was aborted, refused or failed."""
        reason = output.finish_reason
        if reason is not None and reason not in _ENDS:
            self.finished = True
            raise EngineFailure(reason, output.error)
        self.cached_tokens, self.queue_seconds = output.num_cached_tokens, output.queue_seconds
        delta.prompt_logprobs = delta.prompt_logprobs or output.prompt_logprobs
        delta.embedding = output.embedding
        self._begin(output, delta)
        if output.adapters is not None:
            self._version = version_label(output.adapters)
        text_ends = output.finish_reason == "stop" and output.token_ids and output.token_ids[-1] in self._stop_ids
        for i, token_id in enumerate(output.token_ids):
            delta.token_ids.append(token_id)
            delta.versions.append(self._version)
            self.num_tokens += 1
            is_end = text_ends and i == len(output.token_ids) - 1  # counted, but not part of the text
            if output.logprobs is not None and (self._scores_end or not is_end):
                offset = self._text_start + self._detokenizer.decoded_chars
                delta.scores.append(TokenScore(token_id, output.logprobs[i], offset))
            if is_end:
                break
            delta.text += self._detokenizer.feed(token_id)
            if self._detokenizer.stopped:
                self._finish(delta, "stop")
                return
        if reason is not None:
            delta.text += self._detokenizer.flush()
            self._finish(delta, _ENDS[reason])

    def _begin(self, output: SequenceOutput, delta: Delta) -> None:
        """Add the echoed prompt to the first delta."""
        if self._echo is not None:
            delta.text += self._echo.text
            if self._num_logprobs is not None:
                delta.scores += self._echo.scores(output.prompt_logprobs or [], self._num_logprobs)
            self._echo = None

    def _finish(self, delta: Delta, reason: Literal["stop", "length", "abort"]) -> None:
        self.finished = True
        delta.finish_reason = reason
        delta.stop_string = self._detokenizer.stop_string


class EngineFailure(Exception):
    """The engine aborted or refused a sequence, or failed to compute it."""

    def __init__(self, reason: str, message: str | None):
        super().__init__(message or reason)
        self.reason = reason
        self.message = message

"""Incremental detokenization with stop strings."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from server.api.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 4  # of the prompt, which the detokenizer needs to keep the space of the first word


class Detokenizer:
    """Turns the tokens of one sequence into text incrementally.

    Holds back the bytes of an incomplete character and any suffix that may begin a stop string, so that released text
    is final. A stop string is released only with `include_stop`, and the text after it never. A stop string may have
    special tokens in it, also where `skip_special` keeps these out of the released text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        shown: Sequence[str] = (),
    ):
        """`shown` are tokens that stay in the text, even if they are special."""
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.special_ids - {tokenizer.backend.token_to_id(token) for token in shown}
        is_read = any(text in each for each in stop for text in tokenizer.special_texts)
        self._hides = skip_special and (is_read or self._hidden_ids != tokenizer.special_ids)
        self._skips = skip_special and not self._hides
        self._stream = DecodeStream(ids=_priming(tokenizer, prompt), skip_special_tokens=self._skips)
        self._undecoded: list[int] = []
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # parts of the held text that are special tokens to leave out
        self.decoded_chars = 0  # of all tokens so far, whether released or not
        self.stopped = False
        self.stop_string: str | None = None  # that was found

    def feed(self, token_id: int) -> str:
        """Return the text that this token releases; may be empty."""
        if not self._stop and not self._hides:  # then no text is held back
            return self._decode(token_id)
        self._num_tokens += 1
        self._hold(token_id)
        if self._num_tokens < self._min_tokens:
            return self._release(len(self._held))
        found = [(at, len(stop), stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, length, self.stop_string = min(found)
            self.stopped = True
            return self._end_at(at, length)
        return self._release(len(self._held) - self._stop_prefix_length())

    def flush(self) -> str:
        """Return the remaining text after the last token; an incomplete character becomes the replacement character."""
        if self.stopped:
            return ""
        if self._undecoded:
            self._held += self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skips)
        return self._release(len(self._held))

    def _decode(self, token_id: int) -> str:
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the backend raises a bare Exception if a token changes the text before it
            self._stream = DecodeStream(skip_special_tokens=self._skips)
            text = self._stream.step(self._tokenizer.backend, token_id)
        if text is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        self.decoded_chars += len(text)
        return str(text)

    def _hold(self, token_id: int) -> None:
        text = self._decode(token_id)
        self._held += text
        if self._hides and token_id in self._hidden_ids:
            length = len(self._tokenizer.token_bytes(token_id).decode())
            self._hidden.append((len(self._held) - length, len(self._held)))
            self.decoded_chars -= length

    def _end_at(self, stop: int, length: int) -> str:
        """Release the text up to the stop string, or with it; a special token in it was asked for, so it is shown."""
        self._hidden = [(start, end) for start, end in self._hidden if end <= stop]
        return self._release(stop + length * self._include_stop)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        for start, end in reversed(self._hidden):
            released = released[:start] + released[end:]
        self._hidden = [(start - length, end - length) for start, end in self._hidden if start >= length]
        return released

    def _stop_prefix_length(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _priming(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the last tokens of the prompt; none if they end within a character, which the stream would emit."""
    ids = list(prompt[-_CONTEXT_TOKENS:])
    return [] if tokenizer.decode(ids).endswith("\ufffd") else ids

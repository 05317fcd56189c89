"""The tokenizer with its chat template, and incremental detokenization with stop strings."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from adapters.peft.tokenizer_files import BaseTokens
from server.api.errors import bad_request
from server.api.text.chat_template import ChatTemplate, base_template
from server.base_tokenizer import BaseTokenizer

_CHARS_PER_TOKEN = 16  # an upper bound for real text; avoids tokenizing prompts that cannot fit
_CONTEXT_TOKENS = 4  # of the prompt, which the detokenizer needs to keep the space of the first word


class Tokenizer:
    """A tokenizer over the Rust backend, which is thread-safe.

    `special_tokens` are variables of the chat template; `end_ids` end an output in addition to the base model's EOS
    tokens.
    """

    def __init__(
        self,
        backend: Backend,
        template: ChatTemplate | None,
        special_tokens: Mapping[str, str],
        special_ids: Collection[int],
        end_ids: tuple[int, ...] = (),
    ):
        self.backend = backend
        self.template = template
        self.special_tokens = dict(special_tokens)
        self.end_ids = end_ids
        self._byte_level = self.backend.decoder is not None and b"ByteLevel" in self.backend.decoder.__getstate__()
        self.special_ids = frozenset(special_ids)

    @classmethod
    def of(cls, base: BaseTokenizer) -> "Tokenizer":
        """Build the base model's tokenizer, whose chat template is trusted."""
        template = None if base.chat_template is None else base_template(base.chat_template)
        return cls(Backend.from_str(base.backend), template, base.special_tokens, base.special_ids)

    @property
    def tokens(self) -> BaseTokens:
        """The tokens that an adapter without a tokenizer of its own may name."""
        return BaseTokens(self.backend.token_to_id, self.special_tokens.get("eos_token"))

    async def encode(self, text: str, max_tokens: int) -> list[int]:
        return await self._encode(text, max_tokens, add_special_tokens=True)

    async def render(
        self, messages: list[dict[str, str]], max_tokens: int, *, continue_final: bool = False
    ) -> list[int]:
        """Render a conversation with the chat template and return its token ids."""
        if self.template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "model", "unsupported")
        _check_length(sum(len(message["content"]) for message in messages), max_tokens)
        text = await self.template.render(messages, self.special_tokens, continue_final=continue_final)
        return await self._encode(text, max_tokens, add_special_tokens=False)

    async def _encode(self, text: str, max_tokens: int, *, add_special_tokens: bool) -> list[int]:
        _check_length(len(text), max_tokens)
        encoding = await asyncio.to_thread(self.backend.encode, text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token, which may be part of a character."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return str(token).encode()
        if self._byte_level:
            return b"".join(_BYTES.get(char) or char.encode() for char in token)
        if len(token) == 6 and token.startswith("<0x"):  # byte fallback of SentencePiece vocabularies
            return bytes.fromhex(token[3:5])
        return str(token).replace("\u2581", " ").encode()


def _check_length(chars: int, max_tokens: int) -> None:
    if chars > _CHARS_PER_TOKEN * max_tokens:
        raise bad_request(
            f"The prompt of {chars} characters does not fit into the context of {max_tokens} tokens; shorten it.",
            code="context_length_exceeded",
        )


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return GPT-2's mapping from vocabulary characters to bytes, in which printable characters map to themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class Detokenizer:
    """Turns the tokens of one sequence into text incrementally.

    Holds back the bytes of an incomplete character and any suffix that may begin a stop string, so that released text
    is final. A stop string and the text after it are not released.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=_priming(tokenizer, prompt), skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.decoded_chars = 0  # of all tokens so far, whether released or not
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Return the text that this token releases; may be empty."""
        if not self._stop:  # then no text is held back
            return self._decode(token_id)
        self._num_tokens += 1
        self._held += self._decode(token_id)
        if self._num_tokens < self._min_tokens:
            return self._release(len(self._held))
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._stop_prefix_length())

    def flush(self) -> str:
        """Return the remaining text after the last token; an incomplete character becomes the replacement character."""
        if self.stopped:
            return ""
        if self._undecoded:
            self._held += self._tokenizer.decode(self._undecoded)
        return self._release(len(self._held))

    def _decode(self, token_id: int) -> str:
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the backend raises a bare Exception if a token changes the text before it
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer.backend, token_id)
        if text is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        self.decoded_chars += len(text)
        return str(text)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _stop_prefix_length(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _priming(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the last tokens of the prompt; none if they end within a character, which the stream would emit."""
    ids = list(prompt[-_CONTEXT_TOKENS:])
    return [] if tokenizer.decode(ids).endswith("\ufffd") else ids


def finite(logprob: float) -> float:
    """Replace minus infinity, which JSON cannot express, with -9999 as OpenAI does."""
    return max(logprob, -9999.0)

"""Between text and token ids: the tokenizer with its chat template, and incremental detokenizing with stop strings."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from server.api.errors import bad_request

_CHARS_PER_TOKEN = 16  # no sane text has more; tokenizing a longer one would only burn a core
_CONTEXT_TOKENS = 4  # of the prompt that a detokenizer needs to see, so that a first word keeps its space


class TokenizerUnusable(Exception):
    """The model's tokenizer has no fast (Rust) backend, which incremental decoding needs."""


class ChatTemplate(Protocol):
    """Makes the text of a prompt out of a conversation. Raises `ApiError` when it refuses to."""

    async def render(
        self, messages: list[dict[str, str]], special_tokens: Mapping[str, str], *, continue_final: bool
    ) -> str: ...


class Tokenizer:
    """Text goes through the Rust backend directly, which threads may share.

    `special_tokens` are known to the chat template by their names; `end_ids` end an answer, besides those that end the
    base model's.
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
    def of(cls, tokenizer: Any) -> "Tokenizer":
        """A transformers tokenizer, whose chat template is trusted. Raises `TokenizerUnusable`."""
        if not tokenizer.is_fast:
            raise TokenizerUnusable(f"{type(tokenizer).__name__} has no fast version")
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        template = None if tokenizer.chat_template is None else _OwnTemplate(tokenizer)
        named = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
        }
        return cls(tokenizer.backend_tokenizer, template, named, tokenizer.all_special_ids)

    @classmethod
    def load(cls, model: str) -> "Tokenizer":
        """The tokenizer that belongs to `model`: a folder, a .gguf file or a hub id."""
        if model.endswith(".gguf"):
            return cls.of(AutoTokenizer.from_pretrained(Path(model).parent, gguf_file=Path(model).name))
        return cls.of(AutoTokenizer.from_pretrained(model, trust_remote_code=False))

    async def encode(self, text: str, max_tokens: int) -> list[int]:
        return await self._encode(text, max_tokens, add_special_tokens=True)

    async def render(
        self, messages: list[dict[str, str]], max_tokens: int, *, continue_final: bool = False
    ) -> list[int]:
        """Token ids of a conversation in the chat template."""
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
        """The exact bytes of one token, which need not be whole characters."""
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


class _OwnTemplate:
    """The base model's template, rendered in this process."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    async def render(
        self, messages: list[dict[str, str]], special_tokens: Mapping[str, str], *, continue_final: bool
    ) -> str:
        return await asyncio.to_thread(self._render, messages, special_tokens, continue_final)

    def _render(self, messages: list[dict[str, str]], special_tokens: Mapping[str, str], continue_final: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
                **special_tokens,
            )
        except Exception as error:  # a template is a program: it refuses what it does not expect in its own ways
            raise bad_request("The model's chat template refuses these messages.", "messages") from error
        return text


def _check_length(chars: int, max_tokens: int) -> None:
    if chars > _CHARS_PER_TOKEN * max_tokens:
        raise bad_request(
            f"The prompt of {chars} characters cannot fit into the context of {max_tokens} tokens.",
            code="context_length_exceeded",
        )


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's mapping of characters in the vocabulary to bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    Held back are bytes of an unfinished character and any ending that could be the start of a stop string, so what
    was released never has to be taken back. A stop string and what follows it are not released.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=_priming(tokenizer, prompt), skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.decoded_chars = 0  # of all tokens so far, released or not
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Text that this token releases; may be empty."""
        if not self._stop:  # then nothing is ever held back
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
        """The rest, once no token will follow: an unfinished character becomes the replacement character."""
        if self.stopped:
            return ""
        if self._undecoded:
            self._held += self._tokenizer.decode(self._undecoded)
        return self._release(len(self._held))

    def _decode(self, token_id: int) -> str:
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the backend raises a bare one when a token changes what was decoded before it
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
        """Length of the longest ending of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _priming(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's end, unless it ends within a character: then the stream would emit the priming itself."""
    ids = list(prompt[-_CONTEXT_TOKENS:])
    return [] if tokenizer.decode(ids).endswith("\ufffd") else ids


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot happen is as unlikely as OpenAI says it, -9999."""
    return max(logprob, -9999.0)

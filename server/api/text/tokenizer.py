"""The tokenizer with its chat template."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from tokenizers import Tokenizer as Backend

from adapters.errors import reraise_unless_foreign
from adapters.peft.tokenizer_files import BaseTokens
from server.api.errors import ApiError, bad_request
from server.api.text import tool_prompt
from server.api.text.chat_template import ChatTemplate, Conversation, base_template
from server.base_tokenizer import BaseTokenizer

_CHARS_PER_TOKEN = 16  # an upper bound for real text; avoids tokenizing prompts that cannot fit


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

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        found = (self.backend.id_to_token(token_id) for token_id in sorted(self.special_ids))
        return tuple(text for text in found if text)

    @property
    def tokens(self) -> BaseTokens:
        """The tokens that an adapter without a tokenizer of its own may name."""
        return BaseTokens(self.backend.token_to_id, self.special_tokens.get("eos_token"))

    async def render(
        self, conversation: Conversation, max_tokens: int, *, add_special_tokens: bool = False
    ) -> list[int]:
        """Render a conversation with the chat template and return its token ids."""
        if self.template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "model", "unsupported")
        _check_length(sum(len(message["content"]) for message in conversation.messages), max_tokens, "messages")
        if self.template.renders_tools:
            text = await self.template.render(conversation, self.special_tokens)
        else:
            text = await tool_prompt.render(self.template, conversation, self.special_tokens)
        return await self.encode(text, max_tokens, add_special_tokens=add_special_tokens, param="messages")

    async def encode(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        _check_length(len(text), max_tokens, param)
        try:
            encoding = await asyncio.to_thread(self.backend.encode, text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            reraise_unless_foreign(error)
            raise bad_request("The tokenizer of this model cannot encode this text.", param) from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
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


def _check_length(chars: int, max_tokens: int, param: str) -> None:
    if chars > _CHARS_PER_TOKEN * max_tokens:
        raise context_exceeded(max_tokens, f"your {param} have {chars} characters", param)


def context_exceeded(max_tokens: int, but: str, param: str) -> ApiError:
    """Return the 400 for a prompt that is too long, which clients recognize by the beginning of its message."""
    message = f"This model's maximum context length is {max_tokens} tokens. However, {but}. Please shorten the {param}"
    return bad_request(f"{message} or request fewer tokens.", param, "context_length_exceeded")


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return GPT-2's mapping from vocabulary characters to bytes, in which printable characters map to themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


def finite(logprob: float) -> float:
    """Replace minus infinity, which JSON cannot express, with -9999 as OpenAI does."""
    return max(logprob, -9999.0)

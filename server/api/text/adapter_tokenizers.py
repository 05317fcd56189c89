"""Tokenizers of adapters that bring their own tokenizer or chat template: one per version, loaded on first use."""

import asyncio
from collections.abc import Mapping
from typing import Any

from adapters.peft.tokenizer_files import read_tokenizer_files
from adapters.registry.store import AdapterStore
from adapters.traits import Traits
from server.api.errors import bad_request
from server.api.text.template_sandbox import TemplateFailed, TemplateSandbox
from server.api.text.tokenizer import Tokenizer

_KEPT = 16
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # the mark that transformers uses; templates may trim it


class AdapterTokenizers:
    """A cache of the most recently used tokenizers. Adapters without one use the base model's."""

    def __init__(self, base: Tokenizer, store: AdapterStore, sandbox: TemplateSandbox):
        self._base = base
        self._store = store
        self._sandbox = sandbox
        self._loaded: dict[str, asyncio.Future[Tokenizer]] = {}  # oldest first

    async def of(self, digest: str | None, traits: Traits) -> Tokenizer:
        """Return the tokenizer of a version (None: the base model). Raises `FileNotFoundError` if it was deleted."""
        if digest is None or not (traits.tokenizer or traits.chat_template):
            return self._base
        loaded = self._loaded.pop(digest, None) or asyncio.ensure_future(asyncio.to_thread(self._load, digest))
        self._loaded[digest] = loaded
        if len(self._loaded) > _KEPT:
            del self._loaded[next(iter(self._loaded))]
        try:
            return await asyncio.shield(loaded)  # other requests may wait for it too
        finally:
            if loaded.done() and loaded.exception() is not None:
                self._loaded.pop(digest, None)

    def _load(self, digest: str) -> Tokenizer:
        files = read_tokenizer_files(self._store.path(digest))
        if digest not in self._store:
            raise FileNotFoundError  # it was deleted while it was read
        base, end = self._base, files.special_tokens.get("eos_token")
        backend = files.build() if files.tokenizer is not None else base.backend
        end_id = None if end is None else backend.token_to_id(end)
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        return Tokenizer(
            backend,
            base.template if files.chat_template is None else _SandboxedTemplate(self._sandbox, files.chat_template),
            base.special_tokens | files.special_tokens,
            special if files.tokenizer is not None else base.special_ids,
            () if end_id is None else (end_id,),
        )


class _SandboxedTemplate:
    """The chat template of an adapter. Renders one conversation at a time, so that an adapter occupies one worker."""

    def __init__(self, sandbox: TemplateSandbox, source: str):
        self._sandbox = sandbox
        self._source = source
        self._turn = asyncio.Lock()

    async def render(
        self, messages: list[dict[str, str]], special_tokens: Mapping[str, str], *, continue_final: bool
    ) -> str:
        context: dict[str, Any] = {
            **special_tokens,
            "messages": _marked(messages) if continue_final else messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": not continue_final,
        }
        try:
            async with self._turn:
                text = await self._sandbox.render(self._source, context)
        except TemplateFailed as failed:
            raise bad_request(f"The adapter's chat template failed: {failed}.", "messages") from None
        return _up_to_mark(text) if continue_final else text


def _marked(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    *others, last = messages
    return [*others, {**last, "content": last["content"] + _MARK}]


def _up_to_mark(text: str) -> str:
    """Return the text up to the end of the last message. Templates that trim messages have trimmed the mark as well."""
    before, mark, after = text.rpartition(_MARK.strip())
    if not mark:
        raise bad_request(
            "The adapter's chat template does not render the last message, so it cannot be continued.", "messages"
        )
    return before if after.startswith(" ") else before.rstrip()

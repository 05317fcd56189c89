"""Tokenizers of adapters that bring their own tokenizer or chat template: one per version, loaded on first use."""

import asyncio
from collections.abc import Callable

from adapters.peft.tokenizer_files import read_tokenizer_files
from adapters.registry.store import AdapterStore
from adapters.traits import Traits
from server.api.text.chat_template import adapter_template
from server.api.text.template_sandbox import TemplateSandbox
from server.api.text.tokenizer import Tokenizer

_KEPT = 16


class AdapterTokenizers:
    """A cache of the most recently used tokenizers. Adapters without one use the base model's."""

    def __init__(self, base: Callable[[], Tokenizer], store: AdapterStore, sandbox: TemplateSandbox):
        """`base` returns the base model's tokenizer, which is known once the engine is ready."""
        self._base = base
        self._store = store
        self._sandbox = sandbox
        self._loaded: dict[str, asyncio.Future[Tokenizer]] = {}  # oldest first

    async def of(self, digest: str | None, traits: Traits) -> Tokenizer:
        """Return the tokenizer of a version (None: the base model). Raises `FileNotFoundError` if it was deleted."""
        if digest is None or not (traits.tokenizer or traits.chat_template or traits.eos_token):
            return self._base()
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
        base, end = self._base(), files.special_tokens.get("eos_token")
        backend = files.build() if files.tokenizer is not None else base.backend
        end_id = None if end is None else backend.token_to_id(end)
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        return Tokenizer(
            backend,
            base.template if files.chat_template is None else adapter_template(files.chat_template, self._sandbox),
            base.special_tokens | files.special_tokens,
            special if files.tokenizer is not None else base.special_ids,
            () if end_id is None else (end_id,),
        )

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
        self._loaded: dict[tuple[str, str | None], asyncio.Future[Tokenizer]] = {}  # oldest first

    async def of(self, digest: str | None, traits: Traits, chat_template: str | None = None) -> Tokenizer:
        """Return the tokenizer of a version (None: the base model), with `chat_template` in place of its own. Raises
        `FileNotFoundError` if the version was deleted."""
        has_own = traits.tokenizer or traits.chat_template or traits.eos_token or chat_template is not None
        if digest is None or not has_own:
            return self._base()
        key = digest, chat_template
        loaded = self._loaded.pop(key, None) or asyncio.ensure_future(asyncio.to_thread(self._load, *key))
        self._loaded[key] = loaded
        if len(self._loaded) > _KEPT:
            del self._loaded[next(iter(self._loaded))]
        try:
            return await asyncio.shield(loaded)  # other requests may wait for it too
        finally:
            if loaded.done() and loaded.exception() is not None:
                self._loaded.pop(key, None)

    def _load(self, digest: str, chat_template: str | None) -> Tokenizer:
        files = read_tokenizer_files(self._store.path(digest))
        if digest not in self._store:
            raise FileNotFoundError  # it was deleted while it was read
        base, end = self._base(), files.special_tokens.get("eos_token")
        backend = files.build() if files.tokenizer is not None else base.backend
        end_id = None if end is None else backend.token_to_id(end)
        template = files.chat_template if chat_template is None else chat_template
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        return Tokenizer(
            backend,
            base.template if template is None else adapter_template(template, self._sandbox),
            base.special_tokens | files.special_tokens,
            special if files.tokenizer is not None else base.special_ids,
            () if end_id is None else (end_id,),
        )

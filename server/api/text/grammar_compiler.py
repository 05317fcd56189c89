"""Grammars of requests, compiled in worker processes with limits on time and memory, and kept.

A grammar comes from anyone who may send a request, and some cost far more than their text: a worker finds that out, so
that neither the event loop nor the engine does.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Literal, NamedTuple

from server.api.text import grammar_worker
from server.api.text.worker_pool import WorkerFailed, WorkerPool
from server.grammar_limits import PARSER_LIMITS

WORKERS = 2
COMPILE_SECONDS = 4.0
_MAX_RESPONSE_BYTES = 4 << 20
_KEPT_CHARS = 16 << 20  # of compiled grammars


class GrammarSource(NamedTuple):
    """A grammar as text: a JSON schema, a regular expression, a JSON list of choices, or a grammar in EBNF or Lark."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str


class GrammarInvalid(Exception):
    """A grammar cannot be compiled; the message has the reason."""


class GrammarCompiler:
    """Worker processes for grammars, and the most recently used grammars that they compiled."""

    def __init__(self) -> None:
        self._workers = WorkerPool(Path(grammar_worker.__file__), WORKERS, _MAX_RESPONSE_BYTES)
        self._kept: OrderedDict[GrammarSource, str] = OrderedDict()
        self._kept_chars = 0

    async def compile(self, source: GrammarSource) -> str:
        """Return llguidance's description of a grammar. Raises `GrammarInvalid`."""
        if source not in self._kept:
            self._keep(source, await self._compile(source))
        self._kept.move_to_end(source)
        return self._kept[source]

    async def close(self) -> None:
        """End the workers. The compiler must not be used afterwards."""
        await self._workers.close()

    async def _compile(self, source: GrammarSource) -> str:
        request = {"kind": source.kind, "source": source.text, "limits": PARSER_LIMITS}
        try:
            return await self._workers.request(request, COMPILE_SECONDS)
        except WorkerFailed as failed:
            raise GrammarInvalid(str(failed)) from None

    def _keep(self, source: GrammarSource, grammar: str) -> None:
        if source in self._kept:  # another request compiled it meanwhile
            return
        self._kept[source] = grammar
        self._kept_chars += len(source.text) + len(grammar)
        while self._kept_chars > _KEPT_CHARS and len(self._kept) > 1:
            oldest, dropped = self._kept.popitem(last=False)
            self._kept_chars -= len(oldest.text) + len(dropped)

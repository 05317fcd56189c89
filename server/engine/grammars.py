"""Parsers of grammars over the tokens of a model, kept by grammar. Does not use torch.

llguidance is imported by the first constraint: an engine starts sooner without it, and may run where it is missing.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from server.grammar_limits import PARSER_LIMITS
from server.request import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT_PARSERS = 64
_KEPT_TOKENIZERS = 8  # the base model's among them
_MAX_REASON_CHARS = 300
_LIMITS: dict[str, Any] = PARSER_LIMITS
_NO_END = "<|no end token|>"


class ConstraintFailed(Exception):
    """A constraint cannot be applied; the message has the reason for the client."""


class Grammars:
    """Makes parsers, in any thread. `backend` returns the JSON of the tokenizer of a version, or of the base model."""

    def __init__(self, backend: Callable[[str], str], eos_token_ids: frozenset[int]) -> None:
        self._backend = backend
        self._eos_token_ids = eos_token_ids
        self._tokenizers: OrderedDict[str, LLTokenizer] = OrderedDict()
        self._parsers: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = Lock()  # held while a tokenizer is read, which other requests would read as well

    def parser(self, constraint: Constraint) -> "LLMatcher":
        """Return a parser at the beginning of an output. Raises `ConstraintFailed`."""
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            tokenizer = self._tokenizer(constraint.tokenizer)
            found = self._parsers.get(constraint)
        if found is None:
            found = LLMatcher(tokenizer, constraint.grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
            if found.is_error():
                raise ConstraintFailed(f"the grammar cannot be used: {reason_of(found)}")
        with self._lock:
            _keep(self._parsers, constraint, found, _KEPT_PARSERS)
            return found.deep_copy()

    def end_tokens(self, constraint: Constraint) -> list[int]:
        """Return the tokens that the parsers of this tokenizer take for the end of an output."""
        with self._lock:
            return list(self._tokenizer(constraint.tokenizer).eos_tokens)

    def _tokenizer(self, version: str) -> "LLTokenizer":
        found = self._tokenizers.get(version)
        if found is None:
            found = self._read(version)
        _keep(self._tokenizers, version, found, _KEPT_TOKENIZERS)
        return found

    def _read(self, version: str) -> "LLTokenizer":
        """Read a tokenizer. A model without end tokens gets one beyond its vocabulary, which is never chosen."""
        from llguidance import LLTokenizer

        try:
            backend = Tokenizer.from_str(self._backend(version))
            ends = [token for token in sorted(self._eos_token_ids) if backend.id_to_token(token) is not None]
            if not ends:
                backend.add_special_tokens([AddedToken(_NO_END, special=True)])
                ends = [
                    token for token, added in backend.get_added_tokens_decoder().items() if added.content == _NO_END
                ]
            return LLTokenizer(backend.to_str(), eos_token=ends)
        except Exception as error:  # a file that is gone, or a kind of tokenizer that llguidance cannot read
            reason = str(error)[:_MAX_REASON_CHARS]
            raise ConstraintFailed(f"outputs of this model's tokenizer cannot be constrained: {reason}") from error


def reason_of(parser: "LLMatcher") -> str:
    """Return the first line of a parser's error; the rest describes its state."""
    lines = parser.get_error().splitlines()
    return lines[0][:_MAX_REASON_CHARS] if lines else "it failed"


def _keep(kept: "OrderedDict[Any, Any]", key: Any, value: Any, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)

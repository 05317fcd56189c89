"""Constraints of sequences: their parsers, from the request to the end of the output, and the masks of a step."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from server.engine.grammars import ConstraintFailed, Grammars, reason_of
from server.ipc.messages import Submit
from server.model.sampling.allowed import AllowedTokens
from server.model.sampling.categorical import Array
from server.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLMatcher

FREE_SECONDS = 0.02  # of processor time, that every mask may take
MAX_SLOW_SECONDS = 2.0  # that the masks of one sequence may take beyond that, because all rows of a step wait for them

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Parser:
    """The parser of one sequence, which has read its output, and the tokens that end an output for the parser."""

    matcher: "LLMatcher"
    ends: list[int]
    slow_seconds: float = 0.0

    def mask(self, seq: Sequence) -> Array:
        """Return one bit for each token that may come next. End tokens may if the grammar accepts the output, unless
        the request says otherwise; if nothing else may, they always may."""
        began = time.thread_time()
        mask: Array = np.frombuffer(bytearray(self.matcher.compute_bitmask()), np.uint8)
        self.slow_seconds += max(time.thread_time() - began - FREE_SECONDS, 0)
        if not self.matcher.is_accepting():
            return mask
        others = _without(mask, self.ends)
        may_end = seq.num_output_tokens >= seq.sampling.min_tokens
        if others.any() and (seq.sampling.ignore_eos or not may_end):
            mask = others
        return _with(mask, seq.sampling.stop_token_ids) if may_end else mask

    def take(self, token: int, *, is_last: bool) -> bool:
        """Read the next token, which need not fit the grammar if it `is_last`. Return whether the output is complete.
        Raises `ConstraintFailed`."""
        if self.slow_seconds > MAX_SLOW_SECONDS:
            raise ConstraintFailed("the grammar failed: it takes too long to find the tokens that it allows")
        if self.matcher.is_error() or not (is_last or self.matcher.consume_token(token)):
            raise ConstraintFailed(f"the grammar failed: {reason_of(self.matcher)}")
        return bool(is_last or self.matcher.is_stopped())


class Constraints:
    """The parsers of running sequences, and the requests whose parsers are being built in a thread."""

    def __init__(
        self, grammars: Grammars, mask_threads: int = 1, on_thread_start: Callable[[], None] = lambda: None
    ) -> None:
        """Masks take `mask_threads` threads; more than one pays off where the cores do not compute the model."""
        self._grammars = grammars
        self._parsers: WeakKeyDictionary[Sequence, Parser] = WeakKeyDictionary()
        self._preparing: dict[str, tuple[Submit, Future[Parser]]] = {}
        self._builder = ThreadPoolExecutor(1, "grammars", on_thread_start)
        self._maskers = ThreadPoolExecutor(mask_threads, "masks", on_thread_start)
        self._many = 2 if mask_threads > 1 else math.inf  # rows whose masks are computed in threads

    def __bool__(self) -> bool:
        return bool(self._preparing)

    def close(self) -> None:
        for threads in (self._builder, self._maskers):
            threads.shutdown(cancel_futures=True)

    # -- before the first step -----------------------------------------------------------------------------------

    def prepare(self, request: Submit) -> None:
        """Begin to build the parser of a request with a constraint."""
        self._preparing[request.seq_id] = request, self._builder.submit(self._build, request)

    def cancel(self, seq_id: str) -> bool:
        """Forget a request whose parser is being built; return whether there was one."""
        found = self._preparing.pop(seq_id, None)
        if found is not None:
            found[1].cancel()
        return found is not None

    def prepared(self) -> Iterator[tuple[Submit, Parser | str]]:
        """Yield the requests whose parsers are built, or the reasons why they cannot be."""
        for seq_id, (request, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[seq_id]
                yield request, _result(future)

    def begin(self, seq: Sequence, parser: Parser) -> None:
        self._parsers[seq] = parser

    def _build(self, request: Submit) -> Parser:
        constraint = request.sampling.constraint
        assert constraint is not None
        return Parser(self._grammars.parser(constraint), self._grammars.end_tokens(constraint))

    # -- steps ---------------------------------------------------------------------------------------------------

    def masks(self, seqs: list[Sequence]) -> AllowedTokens:
        """Compute the masks of those of a step's rows that have a constraint and have not ended."""
        rows = [row for row, seq in enumerate(seqs) if self._reads(seq)]
        ask = [seqs[row] for row in rows]
        masks = list(self._maskers.map(self._mask, ask) if len(rows) >= self._many else map(self._mask, ask))
        table = np.zeros((len(rows), max(map(len, masks), default=0)), np.uint8)
        for line, mask in zip(table, masks, strict=True):
            line[: len(mask)] = mask
        return AllowedTokens(np.array(rows, np.int64), table)

    def _reads(self, seq: Sequence) -> bool:
        parser = self._parsers.get(seq)
        return parser is not None and not parser.matcher.is_stopped()  # nor is one that has failed

    def _mask(self, seq: Sequence) -> Array:
        return self._parsers[seq].mask(seq)

    def completes(self, seq: Sequence, token: int, *, is_last: bool) -> bool:
        """Read a sampled token. Return whether the output is complete with it: because it `is_last`, or because the
        grammar allows no other after it. Raises `ConstraintFailed` if the parser exceeds its limits."""
        parser = self._parsers.get(seq)
        return is_last if parser is None else parser.take(token, is_last=is_last)


def _result(future: "Future[Parser]") -> Parser | str:
    try:
        return future.result()
    except ConstraintFailed as failed:
        return str(failed)
    except Exception:
        log.exception("a grammar could not be built")
        return "the constraint could not be prepared; the server's log has details"


def _without(mask: Array, tokens: list[int]) -> Array:
    """Return the mask without some of its tokens."""
    cleared = mask.copy()
    for token in tokens:
        cleared[token >> 3] &= 0xFF ^ (1 << (token & 7))
    return cleared


def _with(mask: Array, tokens: tuple[int, ...]) -> Array:
    """Return the mask with more tokens, of which the first ones may lie beyond it."""
    needed = max((token >> 3 for token in tokens), default=-1) + 1
    grown = np.concatenate([mask, np.zeros(max(needed - len(mask), 0), np.uint8)])
    for token in tokens:
        grown[token >> 3] |= np.uint8(1 << (token & 7))
    return grown

"""The model of a server under random operations: what every name was at every time, and the text of every version."""

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adapters.registry.registry import RETAINED_VERSIONS
from server.api.text.detokenizer import Detokenizer
from server.api.text.tokenizer import Tokenizer
from server.model.loading.tokenizer import load_tokenizer
from server.request import ScaledAdapter
from tests.fixtures.engine_driver import make_driver

FOREVER = float("inf")
Parts = tuple[ScaledAdapter, ...]


class State(NamedTuple):
    """Of one name: its retained versions, newest first, the one it points at, and whether that is pinned."""

    history: tuple[str, ...] = ()
    current: str | None = None
    pinned: bool = False

    def published(self, digest: str) -> "State":
        if digest == self.current:
            return self
        older = [version for version in self.history if version != digest]
        return State((digest, *older)[:RETAINED_VERSIONS], digest, self.pinned)

    def rolled_back(self) -> "State | None":
        """To the version that was published before the current one, if it is retained."""
        older = self.history[self.history.index(self.current) + 1 :] if self.current else ()
        return self._replace(current=older[0]) if older else None


ABSENT = State()


@dataclass
class Span:
    state: State
    since: float
    until: float = FOREVER


@dataclass
class Name:
    """What a name may have been, and when. While a change is under way both its sides are possible.

    Whoever changes the name holds `lock`; anybody may ask what was possible.
    """

    text: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    _spans: list[Span] = field(default_factory=lambda: [Span(ABSENT, 0.0)])

    @property
    def state(self) -> State:
        """While nobody changes it."""
        (span,) = (span for span in self._spans if span.until == FOREVER)
        return span.state

    def begin(self, outcomes: Collection[State]) -> None:
        now = time.monotonic()
        self._spans = [*self._spans, *(Span(state, now) for state in {*outcomes} - {self.state})]

    def settle(self, state: State) -> None:
        """The change came to its end as `state`."""
        now = time.monotonic()
        for span in self._spans:
            if span.until == FOREVER and span.state != state:
                span.until = now

    def possible(self, since: float) -> set[State]:
        """What it may have been at some time from `since` until now."""
        return {span.state for span in self._spans if span.until >= since}


class Answers:
    """The greedy text of every version, alone and composed, from an engine that does one thing after the other."""

    def __init__(self, model: Path, data_dir: Path, adapters: Collection[Path]):
        self._driver = make_driver(model, data_dir, threads=1)
        self._driver.check = False
        self._tokenizer = Tokenizer.of(load_tokenizer(str(model)))
        self._lock = threading.Lock()
        self._texts: dict[tuple[Parts, tuple[int, ...], int], str] = {}
        self.folders = {self._driver.add_adapter(folder): folder for folder in adapters}

    def close(self) -> None:
        self._driver.engine.close()

    def text(self, parts: Parts, prompt: tuple[int, ...], length: int) -> str:
        key = (tuple(sorted(parts)), prompt, length)
        with self._lock:
            if key not in self._texts:
                self._texts[key] = self._compute(*key)
            return self._texts[key]

    def _compute(self, parts: Parts, prompt: tuple[int, ...], length: int) -> str:
        seq_id = str(len(self._texts))
        self._driver.submit(seq_id, list(prompt), parts, max_tokens=length)
        self._driver.run()
        decoder = Detokenizer(self._tokenizer, prompt)
        text = "".join(decoder.feed(token) for token in self._driver.tokens(seq_id)) + decoder.flush()
        self._driver.outputs.clear()
        self._driver.steps.clear()
        return text

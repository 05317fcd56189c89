"""What the clients of a soak share: the server, its names, its crashes; and what they ask and are answered."""

import itertools
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from load_tests.right_answers import ABSENT, FOREVER, Answers, Name, Parts, State
from server.request import ScaledAdapter
from tests.fixtures.timing import wait_for
from tests.fixtures.tiny_server import BASE, RunningServer

SLOTS = 4
LOGGED = 200


CUT = "connection"  # what a request comes to whose connection ends without a response


class Mismatch(Exception):
    """The server did what the model does not allow."""


@dataclass
class Window:
    """The time of a fault, and the codes of the errors that it explains. While the engine or the server is `away`,
    clients wait."""

    codes: frozenset[str]
    away: bool
    since: float = field(default_factory=time.monotonic)
    until: float = FOREVER

    def end(self) -> None:
        self.until = time.monotonic()


@dataclass
class World:
    """What the clients share."""

    server: RunningServer
    answers: Answers
    names: list[Name]
    broken: Any  # folder of an adapter that must be refused
    counts: Counter[str] = field(default_factory=Counter)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOGGED))
    windows: list[Window] = field(default_factory=list)

    @contextmanager
    def fault(self, *codes: str, away: bool = False) -> Iterator[None]:
        """A fault that lasts as long as the body, and explains errors of these codes."""
        window = self.open_window(*codes, away=away)
        try:
            yield
        finally:
            window.end()

    def open_window(self, *codes: str, away: bool = False) -> Window:
        window = Window(frozenset(codes), away)
        self.windows.append(window)
        return window

    def explained(self, since: float) -> set[str]:
        """The codes of errors that faults since then explain."""
        return {code for window in self.windows if window.until >= since for code in window.codes}

    def crash(self, client: httpx.Client) -> None:
        """Kill the engine, and wait for the next one."""
        with self.fault("engine_unavailable", away=True):
            os.kill(self.server.engine_pid(), signal.SIGKILL)
            wait_for(lambda: client.get("/readyz").status_code == 503, "the server noticing its engine's end")
            wait_for(lambda: client.get("/readyz").status_code == 200, "the restart")

    def wait_for_engine(self) -> None:
        wait_for(lambda: not any(window.away and window.until == FOREVER for window in self.windows), "the restart")

    def pinned(self, since: float) -> set[str]:
        """Versions that may have been pinned at some time since."""
        states = itertools.chain.from_iterable(name.possible(since) for name in self.names)
        return {state.current for state in states if state.pinned and state.current}


@dataclass(frozen=True)
class Asked:
    """One inference request: names and scales (none for the base), and when it was sent."""

    parts: tuple[tuple[Name, float], ...]
    prompt: tuple[int, ...]
    length: int
    since: float

    def body(self, *, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": list(self.prompt), "max_tokens": self.length, "stream": stream}
        body |= {"model": BASE, "temperature": 0, "ignore_eos": True}
        if len(self.parts) == 1:
            return body | {"model": self.parts[0][0].text, "adapter_scale": self.parts[0][1]}
        return body | {"adapters": [{"name": name.text, "scale": scale} for name, scale in self.parts]}

    def right(self) -> Iterator[Parts]:
        """The versions that may answer: those that were current at some time since it was sent."""
        scaled = [
            {ScaledAdapter(state.current, scale) for state in name.possible(self.since) if state.current}
            for name, scale in self.parts
        ]
        return itertools.product(*scaled)


@dataclass(frozen=True)
class Answer:
    status: int
    code: str | None  # of an error
    message: str = ""  # likewise
    text: str = ""
    fingerprint: str = ""
    complete: bool = True

    @classmethod
    def of(cls, response: httpx.Response) -> "Answer":
        body = response.json()
        if response.status_code != 200:
            return cls(response.status_code, body["error"]["code"], body["error"]["message"])
        return cls(200, None, text=body["choices"][0]["text"], fingerprint=body["system_fingerprint"])


def found_state(http: httpx.Client, name: Name) -> State:
    """What the server says of a name."""
    record = http.get(f"/v1/adapters/{name.text}")
    if record.status_code == 404:
        return ABSENT
    versions = http.get(f"/v1/adapters/{name.text}/versions").json()["data"]
    history = tuple(version["version"].removeprefix("sha256:") for version in versions)
    return State(history, record.json()["version"].removeprefix("sha256:"), record.json()["pinned"])

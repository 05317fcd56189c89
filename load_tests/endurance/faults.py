"""The faults of a run. Each returns when the server has recovered, and tells how long that took."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from load_tests.endurance.lives import Lives
from load_tests.world import CUT, Window, World
from tests.fixtures.remote_servers import Remote
from tests.fixtures.timing import wait_for
from tests.fixtures.tiny_server import BASE

HANG_SECONDS = 4.0  # of the server under test
FULL_SECONDS = OUTAGE_SECONDS = 5.0
# What the fault points of a life do. Errors of the step are explained by the code, and a kill of the engine likewise.
SPECS = {
    "slow disk": "store.flushed:10%=sleep-0.3,store.synced:10%=sleep-0.3,registry.committed:5%=sleep-0.2,"
    "engine.load:5%=sleep-0.3,packed.written:10%=sleep-0.3",
    "failing steps": "engine.step:0.3%=error",
    "dying engine": "engine.message:0.1%=kill,ipc.to_api:0.02%=kill,engine.load:0.2%=kill",
    "disk that is full now and then": "store.flushed:5%=full,store.synced:5%=full",
}
CODES = {  # of the errors that a life's faults explain
    "slow disk": (),
    "failing steps": ("engine_error",),
    "dying engine": ("engine_unavailable",),
    "disk that is full now and then": ("insufficient_storage",),
}


@dataclass
class Faults:
    """All that can happen to one server. `disk` is the small file system of its data, if there is one."""

    world: World
    lives: Lives
    remote: Remote
    disk: Path | None
    rng: random.Random
    recoveries: list[tuple[str, float, float]] = field(default_factory=list)  # fault, when, seconds until it was over
    _of_life: Window | None = None
    _left: list[str] = field(default_factory=list)

    def next(self, client: httpx.Client) -> str:
        """Let one fault happen; each happens as often as any other."""
        known = self._known()
        self._left = self._left or self.rng.sample(sorted(known), len(known))
        name, began = self._left.pop(), time.monotonic()
        known[name](client)
        wait_for(lambda: self.lives.is_ready(client), "the server being ready")
        self.recoveries.append((name, began, time.monotonic() - began))
        return name

    def _known(self) -> dict[str, Callable[[httpx.Client], None]]:
        found: dict[str, Callable[[httpx.Client], None]] = {
            "the engine is killed": self.world.crash,
            "the engine stops for a moment": self.pause,
            "the engine stops": self.stop,
            "the server is killed": lambda client: self.restart(client, ""),
            "the clock jumps": self.jump,
            "the source is away": self.outage,
        }
        for name in SPECS:
            found[f"a life with: {name}"] = lambda client, name=name: self.restart(client, name)  # type: ignore[misc]
        if self.disk is not None:
            found["the disk is full"] = self.fill
        return found

    def pause(self, client: httpx.Client) -> None:
        """Less than the server takes for a hang: nobody may notice but by the clock."""
        engine = self.world.server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        time.sleep(HANG_SECONDS / 4)
        os.kill(engine, signal.SIGCONT)

    def stop(self, client: httpx.Client) -> None:
        """A hang with work, which a stream of its own makes sure of: the server replaces the engine."""
        with self.world.fault("engine_unavailable", away=True):
            os.kill(self.world.server.engine_pid(), signal.SIGSTOP)
            client.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 1})
            wait_for(lambda: self.lives.is_ready(client), "the replacement of the engine")

    def restart(self, client: httpx.Client, name: str) -> None:
        """Kill everything, and start a life with other faults. Those explain errors until the next life begins."""
        with self.world.fault(CUT, "engine_unavailable", away=True):
            self.lives.kill()
            if self._of_life is not None:
                self._of_life.end()
            self._of_life = self.world.open_window(*CODES.get(name, ()))
            self.lives.start_again(SPECS.get(name, ""))

    def jump(self, client: httpx.Client) -> None:
        self.lives.shift_clock(self.rng.choice((-3600, 0, 3600, 86400)))

    def outage(self, client: httpx.Client) -> None:
        with self.world.fault("source_unavailable"):
            self.remote.faults = {"main": [503] * 10_000}
            time.sleep(OUTAGE_SECONDS)
            self.remote.faults = {}
            time.sleep(8)  # the server tries again for so long

    def fill(self, client: httpx.Client) -> None:
        assert self.disk is not None
        junk = self.disk / "junk"
        with self.world.fault("insufficient_storage"):
            with junk.open("wb") as file, suppress(OSError):  # others write as well: until there is no room at all
                for _ in range(1 << 20):
                    left = os.statvfs(self.disk)
                    nbytes = left.f_bavail * left.f_frsize
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(4096, nbytes // 2))
            time.sleep(FULL_SECONDS)
            junk.unlink()

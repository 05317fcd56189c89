"""What a server uses while it runs: memory, descriptors and threads of both processes."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil

from load_tests.endurance.lives import Lives
from load_tests.memory_growth import slope, thinned
from load_tests.world import World

SECONDS = 1.0
WARM_UP = 0.25  # the share of a life's samples that do not count
LEAST = 40  # samples of a life, to say how it grows
MEASURED = ("api_mib", "engine_mib", "api_descriptors", "engine_descriptors", "api_threads", "engine_threads")


class Sampler:
    """Takes a sample a second until it is closed."""

    def __init__(self, world: World, lives: Lives):
        self.samples: list[dict[str, float]] = []
        self._world, self._lives = world, lives
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SECONDS):
            try:
                self.samples.append(self._sample())
            except (psutil.Error, IndexError):  # between two lives of the engine or of the server
                continue

    def _sample(self) -> dict[str, float]:
        server = self._world.server
        engine_pid = server.engine_pid()
        found: dict[str, float] = {"seconds": time.monotonic() - self._began, "life": self._lives.number}
        found |= {"operations": self._world.counts.total(), "engine": engine_pid}
        for name, pid in (("api", server.process.pid), ("engine", engine_pid)):
            process = psutil.Process(pid)
            found[f"{name}_mib"] = process.memory_info().rss / (1 << 20)
            found[f"{name}_descriptors"] = process.num_fds()
            found[f"{name}_threads"] = process.num_threads()
        return found


def slopes(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The growth per 1,000 operations, of the longest time that both processes lived."""
    lives: dict[tuple[float, float], list[dict[str, float]]] = {}
    for sample in samples:
        lives.setdefault((sample["life"], sample["engine"]), []).append(sample)
    longest = max(lives.values(), key=len, default=[])
    counted = longest[int(len(longest) * WARM_UP) :]
    if len(counted) < LEAST:
        return {}
    growth = {
        what: round(slope(thinned([(sample["operations"] / 1000, sample[what]) for sample in counted])), 3)
        for what in MEASURED
    }
    return {"samples": len(counted), "operations": counted[-1]["operations"] - counted[0]["operations"], **growth}

"""`Retry-After` of a full queue: from the rate at which sequences left it lately."""

import pytest

from server.departures import LONGEST_WAIT, UNKNOWN_WAIT, WINDOW, Departures
from server.queue_limits import QueueLimits, Waiting
from tests.fixtures.timing import Clock


class Line:
    """A queue whose clock the test moves."""

    def __init__(self, max_sequences: int = 100, max_tokens: int = 100_000, shared: bool = False):
        self.clock = Clock()
        self.limits = QueueLimits(max_sequences, max_tokens, shared, Waiting(Departures(self.clock)))
        self.present: list[str] = []
        self.number = 0

    def come(self, count: int, tenant: str = "", tokens: int = 10) -> None:
        for _ in range(count):
            self.present.append(name := f"{tenant}-{self.number}")
            self.number += 1
            self.limits.waiting.submitted(name, tenant, 1.0, tokens)

    def serve(self, seconds: float, per_second: int, refill: bool = True) -> None:
        """Take the first ones out at this rate; others come in their places."""
        for _ in range(round(seconds * per_second)):
            self.clock.now += 1 / per_second
            name = self.present.pop(0)
            self.limits.waiting.left(name)
            if refill:
                self.come(1, name.split("-")[0])

    def told(self, sequences: int = 1, tokens: int = 10, tenant: str = "") -> int | None:
        refusal = self.limits.refusal(tenant, 1.0, sequences, sequences * tokens)
        return None if refusal is None else refusal.seconds


@pytest.mark.parametrize(("per_second", "seconds"), [(1, 20), (4, 5), (100, 1)])
def test_a_refused_client_is_told_when_there_will_be_room(per_second: int, seconds: int) -> None:
    line = Line()
    line.come(100)
    line.serve(20, per_second)
    assert line.told(sequences=20) == seconds
    line.serve(seconds - 1, per_second, refill=False)
    assert seconds == 1 or line.told(sequences=20) is not None
    line.serve(1, per_second, refill=False)
    assert line.told(sequences=20) is None


def test_the_unit_that_is_short_decides() -> None:
    line = Line(max_tokens=1000)
    line.come(100)
    line.serve(20, 5)  # 50 tokens per second
    assert line.told(tokens=500) == 10
    assert line.limits.full_for() == 1


def test_a_tenant_over_its_share_waits_for_its_own() -> None:
    """Of a queue of 100, 50 may be one tenant's; its sequences leave at half of the rate."""
    line = Line(shared=True)
    for _ in range(30):
        line.come(1, "a")
        line.come(1, "b")
    line.serve(20, 10)
    assert line.told(tenant="a") is None
    assert line.told(12, tenant="a") == 2  # 42 are 14 more than what is left, and each that goes frees two
    assert line.told(tenant="c") is None


def test_idle_time_does_not_make_the_server_look_slow() -> None:
    line = Line()
    line.come(100)
    line.serve(10, 10)
    line.serve(10, 10, refill=False)
    line.clock.now += 1000
    line.come(100)
    assert line.told(10) == 1


def test_the_rate_is_that_of_late() -> None:
    line = Line()
    line.come(100)
    line.serve(WINDOW, 10)
    line.serve(WINDOW, 1)
    assert line.told(10) == 10


def test_nothing_is_known_at_the_start_and_little_when_nothing_leaves() -> None:
    line = Line()
    line.come(100)
    assert line.told() == line.limits.full_for() == UNKNOWN_WAIT
    line.clock.now += 10
    assert line.told() == 10
    line.clock.now += 10_000
    assert line.told(5) == LONGEST_WAIT


def test_a_restart_of_the_engine_is_idle_time() -> None:
    line = Line()
    line.come(100)
    line.serve(20, 10)
    line.limits.waiting.clear()
    line.clock.now += 500
    line.present.clear()
    line.come(100)
    assert line.told(10) == 1

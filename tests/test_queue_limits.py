"""Who may wait in the queue: shares of tenants, in sequences and tokens, and the queue as a whole."""

import random
from itertools import count

import pytest

from server.queue_limits import QueueLimits


class Queue:
    """Limits, and requests that enter if they may."""

    def __init__(self, max_sequences: int = 256, max_tokens: int = 1 << 20, shared: bool = True):
        self.limits = QueueLimits(max_sequences, max_tokens, shared)
        self.ids = count()
        self.present: dict[str, list[str]] = {}  # by tenant

    def ask(self, tenant: str, sequences: int = 1, tokens: int = 10, weight: float = 1.0) -> str:
        """Try to enter with `sequences` of so many tokens each; return what became of it."""
        refusal = self.limits.refusal(tenant, weight, sequences, sequences * tokens)
        if refusal is not None:
            return "share" if refusal.of_tenant else "full"
        for _ in range(sequences):
            self.present.setdefault(tenant, []).append(name := f"s{next(self.ids)}")
            self.limits.waiting.submitted(name, tenant, weight, tokens)
        return "in"

    def fill(self, tenant: str, weight: float = 1.0, tokens: int = 10) -> int:
        """Enter one by one until refused; return how many wait then."""
        while self.ask(tenant, 1, tokens, weight) == "in":
            pass
        return self.limits.waiting.sequences(tenant)

    def start(self, tenant: str) -> None:
        self.limits.waiting.left(self.present[tenant].pop(0))


def test_one_tenant_s_backlog_is_not_everyone_s() -> None:
    """Five requests of 8 prompts times n=8 filled the queue, and the next tenant was refused."""
    queue = Queue()
    assert [queue.ask("a", 64) for _ in range(5)] == ["in", "in", "share", "share", "share"]
    assert [queue.ask("b") for _ in range(8)] == ["in"] * 8
    assert not queue.limits.full


def test_tokens_are_shared_like_sequences() -> None:
    queue = Queue(max_tokens=10_000)
    assert queue.ask("a", 1, 4000) == "in"
    assert queue.ask("a", 1, 4000) == "share"
    assert queue.ask("b", 8, 100) == "in"
    assert queue.ask("b", 1, 9000) == "full"
    assert queue.limits.waiting.tokens("a") == 4000 and queue.limits.waiting.tokens() == 4800


def test_tenants_that_fill_the_queue_leave_room_for_another() -> None:
    queue = Queue(120)
    assert queue.fill("a") == 60
    for tenant in "bcde":
        assert queue.fill(tenant) >= 1
    assert not queue.limits.full
    for n in range(200):
        queue.ask(f"t{n}")
    assert queue.limits.full and queue.ask("late") == "full"


def test_shares_are_by_weight_whatever_its_unit() -> None:
    for unit in (0.01, 1.0, 25.0):
        queue = Queue(300)
        heavy = queue.fill("heavy", 4 * unit)
        light = queue.fill("light", unit)
        assert heavy == 150 and light == pytest.approx(150 / 5, abs=1)


def test_an_empty_queue_takes_any_request() -> None:
    queue = Queue(max_sequences=2, max_tokens=100)
    assert queue.ask("a", 64, 1000) == "in"
    assert queue.ask("b") == "full"
    for _ in range(64):
        queue.start("a")
    assert queue.ask("b", 8) == "in"


def test_the_only_tenant_may_fill_the_queue() -> None:
    queue = Queue(20, shared=False)
    assert queue.fill("") == 20
    assert queue.limits.full and queue.ask("") == "full"
    queue.start("")
    assert queue.ask("") == "in"


def test_a_large_request_of_somebody_new_is_refused_as_the_queue_s_fault() -> None:
    queue = Queue(20)
    queue.fill("a")
    assert queue.ask("b", 6) == "full"
    assert queue.ask("b", 5) == "in"


def test_who_starts_or_ends_makes_room_and_strangers_are_ignored() -> None:
    queue = Queue(10)
    assert queue.fill("a") == 5
    queue.limits.waiting.left("nobody")
    queue.start("a")
    queue.limits.waiting.left("s0")  # it ends later
    assert queue.limits.waiting.sequences("a") == 4
    assert queue.ask("a") == "in"
    queue.limits.waiting.clear()
    assert (queue.limits.waiting.sequences(), queue.limits.waiting.tokens(), queue.limits.waiting.heaviest()) == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_the_counts_add_up_and_a_newcomer_gets_in_unless_all_is_full(seed: int) -> None:
    chance = random.Random(seed)
    queue = Queue(chance.choice([1, 7, 64]), chance.choice([50, 5000]))
    for step in range(300):
        if chance.random() < 0.6:
            queue.ask(chance.choice("abc"), chance.randint(1, 9), chance.randint(1, 40), chance.choice([0.5, 1.0, 8.0]))
        present = [tenant for tenant, names in queue.present.items() if names]
        if present and chance.random() < 0.5:
            queue.start(chance.choice(present))
        waiting = queue.limits.waiting
        assert waiting.sequences() == sum(map(len, queue.present.values()))
        assert waiting.tokens() == sum(waiting.tokens(tenant) for tenant in "abc")
        assert (queue.limits.refusal(f"new{step}", 1.0, 1, 1) is None) == (not queue.limits.full)

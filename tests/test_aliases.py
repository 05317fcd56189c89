"""The choice of an alias's member for a request."""

import random
from collections import Counter

import pytest

from adapters.registry.aliases import Alias

USERS = [f"user-{i}" for i in range(4000)]


def picks(**weights: int) -> dict[str, str]:
    alias = Alias("prod", weights, 1)
    return {user: alias.pick(user) for user in USERS}


def test_a_user_stays_with_one_member() -> None:
    assert picks(a=50, b=50) == picks(b=50, a=50) == picks(a=1, b=1)
    assert Alias("prod", {"a": 50, "b": 50}, 1).pick("\ud800") in "ab"  # JSON can say that


@pytest.mark.parametrize("weights", [{"a": 90, "b": 10}, {"a": 1, "b": 1, "c": 2}, {"a": 1000, "b": 0, "c": 1000}])
def test_users_come_out_by_weight(weights: dict[str, int]) -> None:
    random.seed(0)
    alias = Alias("prod", weights, 1)
    for counts in (Counter(picks(**weights).values()), Counter(alias.pick(None) for _ in USERS)):
        for member, weight in weights.items():
            share = weight / sum(weights.values())
            assert counts[member] / len(USERS) == pytest.approx(share, abs=5 * (share / len(USERS)) ** 0.5)


def test_a_growing_canary_takes_users_and_moves_nobody_else() -> None:
    before, after = picks(a=50, b=50, canary=5), picks(a=50, b=50, canary=40)
    moved = {user for user in USERS if before[user] != after[user]}
    assert moved and {after[user] for user in moved} == {"canary"}


def test_two_aliases_split_their_users_differently() -> None:
    one, two = (Alias(name, {"a": 1, "b": 1}, 1) for name in ("one", "two"))
    agreeing = sum(one.pick(user) == two.pick(user) for user in USERS)
    assert 0.4 < agreeing / len(USERS) < 0.6


def test_without_a_user_the_choice_is_free() -> None:
    alias = Alias("prod", {"a": 1, "b": 1}, 1)
    for nobody in (None, ""):
        assert {alias.pick(nobody) for _ in range(100)} == {"a", "b"}

"""The host tier: bounded in bytes, with eviction of the least recently used entries."""

import random
from dataclasses import dataclass

import pytest

from adapters.residency.host_cache import HostCache


@dataclass(frozen=True)
class Entry:
    nbytes: int


def make_cache(max_bytes: int, **sizes: int) -> HostCache[Entry]:
    cache: HostCache[Entry] = HostCache(max_bytes)
    for digest, nbytes in sizes.items():
        assert cache.put(digest, Entry(nbytes)) == []
    return cache


def test_the_least_recently_used_entries_go_for_a_new_one() -> None:
    cache = make_cache(10, a=4, b=4, c=2)
    assert cache.get("a") == Entry(4)
    assert cache.put("d", Entry(5)) == ["b", "c"]
    assert cache.digests() == ["a", "d"]
    assert cache.nbytes == 9


def test_a_miss_is_none_and_changes_nothing() -> None:
    cache = make_cache(10, a=4)
    assert cache.get("b") is None
    assert "b" not in cache
    assert cache.digests() == ["a"]


def test_the_newest_entry_stays_even_when_it_is_larger_than_the_bound() -> None:
    cache = make_cache(10, a=4, b=4)
    assert cache.put("huge", Entry(50)) == ["a", "b"]
    assert "huge" in cache
    assert cache.put("c", Entry(1)) == ["huge"]
    assert cache.nbytes == 1


def test_an_entry_that_is_put_again_is_counted_once() -> None:
    cache = make_cache(10, a=4, b=4)
    assert cache.put("a", Entry(6)) == []
    assert cache.nbytes == 10
    assert cache.digests() == ["b", "a"]


def test_dropping_gives_the_bytes_back_and_an_absent_entry_is_no_error() -> None:
    cache = make_cache(10, a=4)
    cache.drop("a")
    cache.drop("a")
    assert (cache.nbytes, cache.digests()) == (0, [])


@pytest.mark.parametrize("seed", range(5))
def test_after_any_operations_the_bytes_add_up(seed: int) -> None:
    chance = random.Random(seed)
    cache = make_cache(20)
    order: list[str] = []  # least recently used first
    sizes: dict[str, int] = {}
    for _ in range(300):
        digest = chance.choice("abcdefgh")
        action = chance.choice(["put", "get", "drop"])
        if digest in order and action != "put":
            order.remove(digest)
        if action == "get" and cache.get(digest) is not None:
            order.append(digest)
        elif action == "drop":
            cache.drop(digest)
        elif action == "put":
            sizes[digest] = chance.randint(0, 12)
            order = [*(other for other in order if other != digest), digest]
            evicted = cache.put(digest, Entry(sizes[digest]))
            assert evicted == order[: len(evicted)]
            order = order[len(evicted) :]
        assert cache.digests() == order
        assert cache.nbytes == sum(sizes[other] for other in order)
        assert cache.nbytes <= 20 or len(order) == 1

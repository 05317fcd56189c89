"""Weights under self-test are read once and verified as asked; all others are read and verified at each load."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters.errors import AdapterInvalid, Problem
from server.engine.weights_reader import WeightsReader


class Store:
    """Notes what is read; each read is another object."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, bool]] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.broken = False

    def load(self, digest: str, verify: bool) -> list[str]:
        self.reads.append((digest, verify))
        self.may_read.wait(10)
        if self.broken:
            raise AdapterInvalid([Problem("weights", "nothing", "something", "malformed_file")])
        return [digest]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def reader(store: Store) -> WeightsReader[list[str]]:
    return WeightsReader(store.load)


def test_every_load_reads_and_verifies(reader: WeightsReader[list[str]], store: Store) -> None:
    assert reader.read("a") is not reader.read("a")
    assert store.reads == [("a", True)] * 2


@pytest.mark.parametrize("verify", [False, True])
def test_a_shared_version_is_read_once(reader: WeightsReader[list[str]], store: Store, verify: bool) -> None:
    reader.share("a", verify=verify)
    assert reader.read("a") is reader.read("a")
    assert reader.read("b") == ["b"]
    assert store.reads == [("a", verify), ("b", True)]


def test_threads_that_read_at_once_share_one_read(reader: WeightsReader[list[str]], store: Store) -> None:
    reader.share("a", verify=False)
    store.may_read.clear()
    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(reader.read, "a") for _ in range(2)]
        store.may_read.set()
        one, other = (future.result() for future in readers)
    assert one is other and len(store.reads) == 1


def test_after_the_last_user_a_load_verifies_again(reader: WeightsReader[list[str]], store: Store) -> None:
    reader.share("a", verify=False)
    reader.share("a", verify=True)  # the same content under another name
    first = reader.read("a")
    reader.unshare("a")
    assert reader.read("a") is first
    reader.unshare("a")
    assert reader.read("a") is not first
    assert store.reads == [("a", False), ("a", True)]


def test_what_cannot_be_read_fails_for_each_reader(reader: WeightsReader[list[str]], store: Store) -> None:
    reader.share("a", verify=False)
    store.broken = True
    for _ in range(2):
        with pytest.raises(AdapterInvalid):
            reader.read("a")
    store.broken = False
    assert reader.read("a") == ["a"]

"""Slow loads of adapters in a live engine: whom they delay."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.runtime.pack import PackedAdapter
from server.ipc.messages import PinAdapter
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver

BOUND = 4


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path / "data", adapter_slots=4, max_wait_steps=BOUND)
    yield made
    made.engine.close()


@pytest.fixture
def digests(driver: Driver, tmp_path: Path) -> list[str]:
    base = tiny_llama()
    return [driver.add_adapter(write_adapter(base, tmp_path / str(seed), seed=seed, r=4)) for seed in range(6)]


@pytest.fixture
def loads(driver: Driver) -> Iterator[threading.Event]:
    """Reads begin and do not end before this is set."""
    may_end, read = threading.Event(), driver.engine.residency._read

    def slow(digest: str) -> PackedAdapter:
        may_end.wait()
        return read(digest)

    driver.engine.residency._read = slow
    may_end.set()
    yield may_end
    may_end.set()


def steps_to_the_first_token(driver: Driver, name: str, digest: str | None) -> int:
    driver.submit(name, [5, 6, 7], digest, max_tokens=2)
    for steps in range(1, 1000):
        driver.step()
        if any(output.token_ids for output in driver.outputs.get(name, [])):
            return steps
    raise AssertionError(f"{name} does not start")


@pytest.mark.reliability("T46")
def test_slow_loads_delay_neither_base_nor_pinned_nor_resident_requests(
    driver: Driver, digests: list[str], loads: threading.Event
) -> None:
    pinned, resident, *cold = digests
    driver.engine.handle(PinAdapter(1, pinned, True))
    driver.submit("warm-up", [5, 6], resident, max_tokens=1)
    driver.run()
    loads.clear()
    driver.submit("background", [9, 9], max_tokens=200)  # the engine is never idle
    for number, digest in enumerate(cold):
        driver.submit(f"cold {number}", [5, 6, 7], digest, max_tokens=2)
        for _ in range(2 * BOUND):
            driver.step()
        for kind, wanted in (("base", None), ("pinned", pinned), ("resident", resident)):
            assert steps_to_the_first_token(driver, f"{kind} {number}", wanted) == 1
    assert not any(f"cold {number}" in driver.outputs for number in range(len(cold)))
    loads.set()
    driver.run()
    for name, outputs in driver.outputs.items():
        assert [output.finish_reason is not None for output in outputs].count(True) == 1, name
        assert outputs[-1].finish_reason == "length"


def test_an_idle_engine_that_waits_for_a_load_takes_whoever_comes(
    driver: Driver, digests: list[str], loads: threading.Event
) -> None:
    loads.clear()
    driver.submit("cold", [5, 6, 7], digests[0], max_tokens=2)
    for _ in range(20 * BOUND):  # polls, in which nothing runs
        driver.step()
    assert steps_to_the_first_token(driver, "base", None) == 1
    loads.set()
    driver.run()
    assert driver.finish_reason("cold") == "length"


def test_a_version_in_host_memory_does_not_wait_for_the_reads_of_others(
    driver: Driver, digests: list[str], loads: threading.Event
) -> None:
    hot, *cold = digests
    for number, digest in enumerate(digests[:5]):  # the fifth evicts the first from the device
        driver.submit(f"warm-up {number}", [5, 6], digest, max_tokens=1)
        driver.run()
    assert driver.engine.residency.where(hot) == "host"
    loads.clear()
    driver.submit("cold", [5, 6, 7], cold[-1], max_tokens=2)
    driver.step()
    driver.submit("hot", [5, 6, 7], hot, max_tokens=2)
    while "hot" not in driver.outputs:
        driver.step()
    assert "cold" not in driver.outputs
    loads.set()
    driver.run()

"""Stored adapters are checked in the background, and a damaged one is known before a request meets it."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from adapters.peft.files import WEIGHTS_FILE
from server.api.adapters import scrub
from server.api.adapters.scrub import DAY_SECONDS, Scrubber
from server.ipc.messages import EngineStats
from tests.fixtures.api_server import Api, assert_error, serving
from tests.fixtures.timing import eventually
from tests.test_healing import DAMAGES, flip

FAST = 10_000.0


@pytest.fixture(autouse=True)
def all_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "CPU_SHARE", 1.0)


def place(api: Api, name: str) -> Path:
    return api.context.registry.store.path(api.context.registry.record(name).version.digest)


def age(api: Api) -> None:
    """Have the last check of every version be long ago; storing a version counts as one."""
    api.context.registry._db.execute("UPDATE checks SET checked = 0")
    api.context.registry._db.commit()


async def check(api: Api, *, due: bool = True) -> None:
    if due:
        age(api)
    await asyncio.to_thread(Scrubber(api.context, FAST).check_due)


async def samples(api: Api, metric: str) -> dict[str, float]:
    lines = (await api.http.get("/metrics")).text.splitlines()
    return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if line.startswith(metric))}


@pytest.mark.reliability("T13")
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a file too many"])
async def test_damage_is_marked_logged_and_counted(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as api:
        for name, seed in (("good", 1), ("bad", 0), ("alike", 0)):
            assert (await api.upload(name, seed=seed)).status_code == 201
        DAMAGES[damage](place(api, "bad"))
        await check(api)
        assert sorted(api.context.registry.damaged) == ["alike", "bad"]
        (message,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
        assert "alike, bad" in message and str(tmp_path) not in message
        assert await samples(api, "loraplex_adapters_damaged") == {"loraplex_adapters_damaged": 2}
        counted = await samples(api, "loraplex_store_checks_total")
        assert list(counted.values()) == [1, 1]
        assert (await api.http.get("/v1/stats")).json()["registry"] == {"adapters": 3, "damaged": 2, "set_aside": 0}
        assert (await api.http.get("/v1/adapters/bad")).json()["state"] == "failed"
        assert (await api.chat(model="good")).status_code == 200
        assert (await api.upload("bad", replace="true")).status_code == 200
        assert api.context.registry.damaged == {}
        for name in ("bad", "alike"):
            assert (await api.chat(model=name)).status_code == 200


async def test_the_oldest_check_is_first_and_none_is_repeated_within_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        registry = api.context.registry
        for seed in range(3):
            await api.upload(f"n{seed}", seed=seed)
        digests = [registry.record(f"n{seed}").version.digest for seed in range(3)]
        now = int(time.time())
        for age, digest in enumerate(digests):
            monkeypatch.setattr(time, "time", lambda age=age: now - 2 * DAY_SECONDS + age)
            registry.note_check(digest, None, registry.store.signature(digest))
        monkeypatch.setattr(time, "time", lambda: now)
        assert registry.unchecked(now - DAY_SECONDS) == digests
        await check(api, due=False)
        assert registry.unchecked(now - DAY_SECONDS) == []
        read: list[Any] = []
        monkeypatch.setattr(scrub, "digest_of", lambda *arguments: read.append(arguments))
        await check(api, due=False)
        assert read == []


async def test_files_that_were_repaired_by_hand_are_served_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        weights = place(api, "acme") / WEIGHTS_FILE
        good = weights.read_bytes()
        flip(weights)
        await check(api)
        assert list(api.context.registry.damaged) == ["acme"]
        weights.write_bytes(good)
        await check(api)
        assert api.context.registry.damaged == {}


@pytest.mark.parametrize(
    ("error", "marked"), [(OSError(5, "Input/output error"), True), (OSError(24, "Too many open files"), False)]
)
async def test_only_faults_of_the_disk_are_damage(
    error: OSError, marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise error

    async with serving(tmp_path) as api:
        await api.upload("acme")
        monkeypatch.setattr(scrub, "digest_of", fail)
        await check(api)
        assert bool(api.context.registry.damaged) == marked


async def test_a_fault_that_passes_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        results = iter(["0" * 64, api.context.registry.record("acme").version.digest])
        monkeypatch.setattr(scrub, "digest_of", lambda *_: next(results))
        await check(api)
        assert api.context.registry.damaged == {}


@pytest.mark.parametrize("meanwhile", ["deleted", "replaced"])
async def test_a_version_that_goes_while_it_is_checked_is_not_marked(
    meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        registry, digest = api.context.registry, api.context.registry.record("acme").version.digest

        def change(*_: object) -> str:
            if meanwhile == "deleted" and "acme" in registry:
                registry.retire("acme")
                registry.collect_garbage()
            elif meanwhile == "replaced":
                weights = registry.store.path(digest) / WEIGHTS_FILE
                copy = weights.with_name("copy")
                copy.write_bytes(weights.read_bytes())
                os.replace(copy, weights)
            return "0" * 64

        monkeypatch.setattr(scrub, "digest_of", change)
        await check(api)
        assert registry.damaged == {}


# --- rate, load and shutdown ---


class Sleeps:
    """A stop event whose waits take no time and are recorded."""

    def __init__(self, then: Callable[[int], None] = lambda _: None) -> None:
        self.seconds: list[float] = []
        self._then = then

    def wait(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        self._then(len(self.seconds))
        return False

    def is_set(self) -> bool:
        return False


async def test_reads_keep_the_rate(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        scrubber, sleeps = Scrubber(api.context, 2.0), Sleeps()
        scrubber._stop = sleeps  # type: ignore[assignment]
        age(api)
        scrubber.check_due()
        size = api.context.registry.record("acme").version.nbytes
        assert sum(sleeps.seconds) == pytest.approx(size / (2 << 20))


async def test_small_versions_take_their_share_of_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of 6 ms of CPU time, of which reading is the smaller part, ten thousand times in a row."""
    monkeypatch.setattr(scrub, "CPU_SHARE", 0.02)
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.upload("other", seed=1)
        clock = Mock(thread_time=Mock(side_effect=[1.0, 1.006, 2.0, 2.006]), monotonic=Mock(return_value=5.0))
        clock.time = time.time
        scrubber, sleeps = Scrubber(api.context, FAST), Sleeps()
        scrubber._stop = sleeps  # type: ignore[assignment]
        age(api)
        with monkeypatch.context() as patch:
            patch.setattr(scrub, "time", clock)
            scrubber.check_due()
        assert [seconds for seconds in sleeps.seconds if seconds > 0.1] == [pytest.approx(0.3)] * 2


async def test_nothing_is_read_while_requests_wait(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        engine = api.context.engine
        engine.stats = EngineStats(waiting=3)

        def then(waits: int) -> None:
            if waits == 10:
                engine.stats = EngineStats()

        scrubber, sleeps = Scrubber(api.context, 1.0), Sleeps(then)
        scrubber._stop = sleeps  # type: ignore[assignment]
        scrubber._pace(1 << 20)
        assert sleeps.seconds == [1.0] + [scrub._BUSY_SECONDS] * 9


async def test_requests_are_served_and_the_end_does_not_wait_for_a_slow_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "ROUND_SECONDS", 0.01)
    async with serving(tmp_path) as api:
        await api.upload("acme")
        reading = []
        scrubber = Scrubber(api.context, 1e-6)  # a byte a second
        pace = scrubber._pace
        monkeypatch.setattr(scrubber, "_pace", lambda size: (reading.append(size), pace(size)))
        age(api)
        running = asyncio.create_task(scrubber.run())
        await eventually(lambda: reading)
        assert (await api.chat(model="acme")).status_code == 200
        assert (await api.upload("other", seed=1)).status_code == 201
        started = time.monotonic()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert time.monotonic() - started < 2 and len(reading) == 1


async def test_a_round_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scrub, "ROUND_SECONDS", 0.01)
    async with serving(tmp_path) as api:
        await api.upload("acme")
        flip(place(api, "acme") / WEIGHTS_FILE)
        unchecked, calls = api.context.registry.unchecked, iter([True])

        def failing(before: int) -> list[str]:
            if next(calls, False):
                raise RuntimeError("once")
            return unchecked(before)

        monkeypatch.setattr(api.context.registry, "unchecked", failing)
        age(api)
        running = asyncio.create_task(Scrubber(api.context, FAST).run())
        await eventually(lambda: api.context.registry.damaged)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert "is tried again" in caplog.text
        assert_error(await api.http.get("/v1/adapters/none"), 404)

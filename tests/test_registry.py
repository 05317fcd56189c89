"""Names and versions across restarts, kills, damage, threads and a second server."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, InvalidName, NoSpace
from adapters.peft.files import FILES
from adapters.records import PendingAdapter
from adapters.registry import db as registry_db
from adapters.registry import registry as registry_module
from adapters.registry import store as store_module
from adapters.registry.aliases import Alias
from adapters.registry.migrations import SCHEMA_VERSION
from adapters.registry.registry import AdapterRecord, AdapterRegistry, RegistryLocked, check_name


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def registry(data_dir: Path) -> Iterator[AdapterRegistry]:
    opened = AdapterRegistry(data_dir, reserved=["base"])
    yield opened
    opened.close()


def digest_of(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def publish(registry: AdapterRegistry, name: str, content: str, **options: Any) -> tuple[AdapterRecord, bool]:
    """Publish a folder whose digest is that of `content`; the registry needs nothing else of an adapter."""
    inspected: Any = SimpleNamespace(
        digest=digest_of(content), rank=8, target_modules=("q_proj",), nbytes=100, report={"features": []}
    )
    with registry.store.stage() as folder:
        for file in FILES:
            (folder / file).write_text(content)
        return registry.publish(name, inspected, folder, **options)


def reopened(registry: AdapterRegistry, data_dir: Path) -> AdapterRegistry:
    registry.close()
    return AdapterRegistry(data_dir)


def state(registry: AdapterRegistry) -> Any:
    records, more = registry.records(limit=1000)
    assert not more
    return [(record, registry.history(record.name)) for record in records]


def folders(registry: AdapterRegistry) -> set[str]:
    return set(registry.store.digests())


# --- publish and resolve ---


def test_publish_then_resolve(registry: AdapterRegistry) -> None:
    before = int(time.time())
    record, created = publish(registry, "one", "v1", source="file:///x", pinned=True)
    assert created
    assert (record.name, record.source, record.pinned) == ("one", "file:///x", True)
    assert record.version.digest == digest_of("v1")
    assert (record.version.rank, record.version.target_modules, record.version.nbytes) == (8, ("q_proj",), 100)
    assert before <= record.created <= time.time()
    assert registry.resolve("one") == record
    assert len(registry) == 1
    assert (registry.store.path(record.version.digest) / FILES[0]).read_text() == "v1"


def test_the_same_bytes_again_change_nothing(registry: AdapterRegistry) -> None:
    first, _ = publish(registry, "one", "v1")
    assert publish(registry, "one", "v1") == (first, False)
    assert publish(registry, "one", "v1", replace=True) == (first, False)
    assert len(registry.history("one")) == 1


def test_a_taken_name_needs_replace(registry: AdapterRegistry) -> None:
    first, _ = publish(registry, "one", "v1")
    with pytest.raises(AdapterConflict, match="replace"):
        publish(registry, "one", "v2")
    assert registry.resolve("one") == first
    second, created = publish(registry, "one", "v2", replace=True)
    assert created and second.version.digest == digest_of("v2")
    assert registry.resolve("one") == second


def test_the_bases_name_is_taken(registry: AdapterRegistry) -> None:
    with pytest.raises(AdapterConflict, match="base model"):
        publish(registry, "base", "v1", replace=True)
    assert len(registry) == 0 and folders(registry) == set()


def test_replacing_keeps_the_pin_and_the_creation_time(registry: AdapterRegistry) -> None:
    first, _ = publish(registry, "one", "v1", pinned=True)
    second, _ = publish(registry, "one", "v2", replace=True)
    assert second.pinned and second.created == first.created


def test_the_same_bytes_under_two_names_are_stored_once(registry: AdapterRegistry) -> None:
    publish(registry, "one", "v1")
    publish(registry, "two", "v1")
    assert folders(registry) == {digest_of("v1")}
    assert registry.names_of(digest_of("v1")) == ["one", "two"]
    registry.retire("one")
    assert registry.collect_garbage() == []
    assert registry.resolve("two")


NAMES = [
    "../x",
    "%2e%2e",
    "/etc",
    ".",
    "..",
    "a/..",
    "a/../b",
    "./a",
    "a//b",
    "a/",
    "",
    "a" * 257,
    "a b",
    "a\0b",
    "a\n",
]
NAMES += ["a\r\nb", "\u0430dapter", "é", "_base", "_unknown", "a@b", "a\\b", "a%2fb", "~", "\ud800", "a" * 10_000]
NAMES += ["org/versions", "org/name/split", "a/files/adapter_config.json"]  # the ends of routes


class Watch:
    """Record every file that Python opens while enabled. An audit hook cannot be removed, so there is only one."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[Any] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open":
            self.opened.append(arguments[0])


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.reliability("T6")
@pytest.mark.parametrize("name", NAMES)
def test_names_that_could_be_paths_are_refused(name: str, registry: AdapterRegistry, watch: Watch) -> None:
    watch.on = True
    with pytest.raises(InvalidName):
        check_name(name)
    for operation in (registry.resolve, registry.retire, registry.history):
        with pytest.raises(AdapterNotFound):
            operation(name)
    with pytest.raises(AdapterNotFound):
        registry.rollback(name, None)
    with pytest.raises(AdapterNotFound):
        registry.set_pinned(name, True)
    watch.on = False
    assert watch.opened == []
    with pytest.raises(InvalidName):
        publish(registry, name, "v1")
    assert len(registry) == 0 and folders(registry) == set()


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "A",
        "0",
        "a.b-c_d",
        "con",
        "a" * 256,
        "a-",
        "a..b",
        "_a",
        "Qwen/Qwen3-LoRA",
        "base:v2",
        "a/b:c/d",
        "versions",
    ],
)
def test_good_names(name: str, registry: AdapterRegistry) -> None:
    publish(registry, name, "v1")
    assert registry.resolve(name).name == registry.resolve(f"{name}@{digest_of('v1')[:12]}").name == name


def test_names_that_differ_in_case_are_two(registry: AdapterRegistry) -> None:
    publish(registry, "Org/Name", "v1")
    publish(registry, "org/name", "v2")
    assert [r.name for r in registry.walk()] == ["Org/Name", "org/name"]
    registry.retire("Org/Name")
    assert registry.resolve("org/name").version.digest == digest_of("v2") and "Org/Name" not in registry


def test_a_version_can_be_named(registry: AdapterRegistry) -> None:
    publish(registry, "one", "v1")
    publish(registry, "one", "v2", replace=True)
    publish(registry, "two", "other")
    old = digest_of("v1")
    for text in (old[:12], old[:40], old, f"sha256:{old}", f"sha256:{old[:12]}"):
        assert registry.resolve(f"one@{text}").version.digest == old
    assert registry.resolve("one").version.digest == digest_of("v2")


def test_everything_unknown_gets_the_same_message(registry: AdapterRegistry) -> None:
    publish(registry, "one", "v1")
    publish(registry, "two", "v2")
    digest = digest_of("v1")
    unknown = ["no", "", "one@", "one@abc", f"one@{digest[:11]}", f"one@{digest.upper()}", f"one@{digest}0", "one@@"]
    unknown += [
        f"one@{digest_of('v2')}",
        f"two@{digest}",
        f"@{digest}",
        f"one@sha256:sha256:{digest}",
        "one@" + "0" * 64,
    ]
    for model in unknown:
        with pytest.raises(AdapterNotFound) as caught:
            registry.resolve(model)
        assert str(caught.value) == f"The model {model!r} does not exist."


@pytest.mark.reliability("T35")
def test_an_untrusted_model_name_is_escaped(registry: AdapterRegistry) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        registry.resolve("a\r\nFAKE\ud800" + "x" * 10_000)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_records_come_by_name_in_pages(registry: AdapterRegistry) -> None:
    for name in ("c", "a", "b", "d"):
        publish(registry, name, name)
    page, more = registry.records(limit=2)
    assert ([record.name for record in page], more) == (["a", "b"], True)
    page, more = registry.records(limit=2, after="b")
    assert ([record.name for record in page], more) == (["c", "d"], False)
    assert registry.records(after="d") == ([], False)


def test_pins(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    assert registry.set_pinned("one", True).pinned
    again = reopened(registry, data_dir)
    assert again.resolve("one").pinned
    assert not again.set_pinned("one", False).pinned
    again.close()


# --- history ---


def current(registry: AdapterRegistry, name: str = "one") -> list[str]:
    """The history of `name` newest first, by content, the current one in brackets."""
    contents = {digest_of(f"v{i}"): f"v{i}" for i in range(20)}
    texts = [(contents[version.digest], version.current) for version in registry.history(name)]
    return [f"[{text}]" if is_current else text for text, is_current in texts]


def test_rollback_goes_back_step_by_step(registry: AdapterRegistry) -> None:
    for i in range(3):
        publish(registry, "one", f"v{i}", replace=True, source=f"source {i}")
    assert current(registry) == ["[v2]", "v1", "v0"]
    assert registry.rollback("one", None).version.digest == digest_of("v1")
    assert registry.resolve("one").source == "source 1"
    assert registry.rollback("one", None).version.digest == digest_of("v0")
    assert current(registry) == ["v2", "v1", "[v0]"]
    with pytest.raises(AdapterConflict, match="earlier"):
        registry.rollback("one", None)
    assert registry.rollback("one", digest_of("v2")[:12]).version.digest == digest_of("v2")
    assert registry.rollback("one", "sha256:" + digest_of("v1")).version.digest == digest_of("v1")
    with pytest.raises(AdapterNotFound):
        registry.rollback("one", digest_of("v7"))
    with pytest.raises(AdapterNotFound):
        registry.rollback("two", None)
    assert current(registry) == ["v2", "[v1]", "v0"]


def test_an_old_version_published_again_is_the_newest(registry: AdapterRegistry) -> None:
    for content in ("v0", "v1", "v0"):
        publish(registry, "one", content, replace=True)
    assert current(registry) == ["[v0]", "v1"]
    assert registry.rollback("one", None).version.digest == digest_of("v1")


def test_five_versions_are_kept(registry: AdapterRegistry, data_dir: Path) -> None:
    for i in range(8):
        publish(registry, "one", f"v{i}", replace=True)
    assert current(registry) == ["[v7]", "v6", "v5", "v4", "v3"]
    with pytest.raises(AdapterNotFound):
        registry.resolve(f"one@{digest_of('v2')}")
    assert sorted(registry.collect_garbage(in_use=[digest_of("v0")])) == sorted([digest_of("v1"), digest_of("v2")])
    assert folders(registry) == {digest_of(f"v{i}") for i in (0, 3, 4, 5, 6, 7)}
    assert registry.collect_garbage() == [digest_of("v0")]
    again = reopened(registry, data_dir)
    assert current(again) == ["[v7]", "v6", "v5", "v4", "v3"]
    again.close()


def test_a_retired_name_is_gone_and_its_bytes_go_later(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    publish(registry, "one", "v2", replace=True)
    assert registry.retire("one").version.digest == digest_of("v2")
    for operation in (registry.resolve, registry.retire, registry.history):
        with pytest.raises(AdapterNotFound):
            operation("one")
    assert folders(registry) == {digest_of("v1"), digest_of("v2")}
    assert registry.collect_garbage(in_use={digest_of("v2")}) == [digest_of("v1")]
    again = reopened(registry, data_dir)
    assert len(again) == 0 and folders(again) == set()
    _, created = publish(again, "one", "v1")
    assert created and current(again) == ["[v1]"]
    again.close()


# --- restart and damage ---


def test_a_restart_changes_nothing(registry: AdapterRegistry, data_dir: Path) -> None:
    for i in range(3):
        publish(registry, "one", f"v{i}", replace=True)
        publish(registry, f"n{i}", f"v{i}")
    registry.rollback("one", None)
    before = state(registry)
    again = reopened(registry, data_dir)
    assert state(again) == before
    assert again.damaged == {}
    again.close()


def test_a_restart_removes_unreferenced_files(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    orphan = registry.store.path("f" * 64)
    orphan.mkdir(parents=True)
    staged = data_dir / "store" / ".staging" / "left"
    staged.mkdir()
    again = reopened(registry, data_dir)
    assert folders(again) == {digest_of("v1")}
    assert not staged.exists()
    again.close()


def spoil(data_dir: Path, statement: str) -> None:
    db = sqlite3.connect(data_dir / registry_db.DATABASE)
    with db:
        db.execute(statement)
    db.close()


def unlink_files(registry: AdapterRegistry, data_dir: Path) -> None:
    (registry.store.path(digest_of("bad")) / FILES[1]).unlink()


def sql(statement: str) -> Callable[[AdapterRegistry, Path], None]:
    return lambda registry, data_dir: spoil(data_dir, statement)


BAD_DIGEST = f"digest = '{digest_of('bad')}'"
DAMAGES: dict[str, tuple[Callable[[AdapterRegistry, Path], None], str]] = {
    "a file deleted": (unlink_files, "missing from the store"),
    "targets": (sql(f"UPDATE versions SET target_modules = '[' WHERE {BAD_DIGEST}"), "cannot be read"),
    "report": (sql(f"UPDATE versions SET report = '' WHERE {BAD_DIGEST}"), "cannot be read"),
    "no version": (sql(f"DELETE FROM versions WHERE {BAD_DIGEST}"), "cannot be read"),
    "no history": (sql("DELETE FROM history WHERE name = 'bad'"), "cannot be read"),
    "digest": (sql("UPDATE history SET digest = '../x' WHERE name = 'bad'"), "cannot be read"),
    "broken text": (sql("UPDATE history SET digest = CAST(X'FFFE' AS TEXT) WHERE name = 'bad'"), "cannot be read"),
}


@pytest.mark.reliability("T13")
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_stays_with_its_adapter(name: str, registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "good", "v1")
    publish(registry, "bad", "bad")
    damage, reason = DAMAGES[name]
    damage(registry, data_dir)
    again = reopened(registry, data_dir)
    try:
        assert again.resolve("good").version.digest == digest_of("v1")
        assert list(again.damaged) == ["bad"] and reason in again.damaged["bad"]
        assert [record.name for record in again.records()[0]] == ["bad", "good"]
        with pytest.raises(AdapterNotFound):
            again.resolve("bad")
        publish(again, "bad", "bad", replace=True)
        assert again.damaged == {}
        assert again.resolve("bad").version.digest == digest_of("bad")
    finally:
        again.close()


def test_a_damaged_adapter_can_be_retired_or_rolled_back(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    publish(registry, "one", "bad", replace=True)
    publish(registry, "bad", "bad")
    unlink_files(registry, data_dir)
    again = reopened(registry, data_dir)
    assert sorted(again.damaged) == ["bad", "one"]
    assert again.resolve(f"one@{digest_of('v1')}").version.digest == digest_of("v1")
    assert again.rollback("one", None).version.digest == digest_of("v1")
    assert again.resolve("one")
    assert again.retire("bad").name == "bad"
    assert again.damaged == {}
    again.close()


@pytest.mark.reliability("T13")
@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000, None])
def test_a_ruined_database_is_set_aside_and_the_files_stay(
    damage: bytes | None, registry: AdapterRegistry, data_dir: Path
) -> None:
    for i in range(10):
        publish(registry, f"n{i}", f"v{i}")
    registry.close()
    path = data_dir / registry_db.DATABASE
    path.write_bytes(path.read_bytes()[:9000] if damage is None else damage)
    for _ in range(2):  # the files stay on the next start as well
        again = AdapterRegistry(data_dir)
        assert len(folders(again)) == 10
        assert len(again) == 0
        again.close()
    assert list(data_dir.glob("*.damaged-*"))
    again = AdapterRegistry(data_dir)
    publish(again, "n1", "v1")
    assert again.resolve("n1")
    again.close()


@pytest.mark.reliability("T13")
def test_a_newer_database_is_not_touched(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    registry.close()
    spoil(data_dir, "PRAGMA user_version = 99")
    with pytest.raises(AdapterError, match="newer version"):
        AdapterRegistry(data_dir)
    spoil(data_dir, "PRAGMA user_version = 1")
    again = AdapterRegistry(data_dir)  # the lock was given back
    assert again.resolve("one")
    again.close()


@pytest.mark.reliability("T11")
def test_a_full_disk_leaves_the_old_version(registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = publish(registry, "one", "v1")
    registry._db.execute(f"PRAGMA max_page_count = {registry._db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(NoSpace):
        publish(registry, "one", "v2", replace=True, source="x" * 100_000)
    assert registry.resolve("one") == before
    registry._db.execute("PRAGMA max_page_count = 1000000")
    assert registry.collect_garbage() == [digest_of("v2")]
    assert publish(registry, "one", "v2", replace=True)[1]


# --- a second server ---

HOLD = """
import sys
from pathlib import Path
from adapters.registry.registry import AdapterRegistry
registry = AdapterRegistry(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_opener_is_refused_at_once(registry: AdapterRegistry, data_dir: Path) -> None:
    """A process that waited for the lock would wait forever."""
    with pytest.raises(RegistryLocked, match=f"process {os.getpid()}"):
        AdapterRegistry(data_dir)
    registry.close()
    registry.close()
    AdapterRegistry(data_dir).close()


@pytest.mark.reliability("T14")
def test_another_process_holds_the_folder_until_it_dies(data_dir: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        with pytest.raises(RegistryLocked, match=f"process {child.pid}"):
            AdapterRegistry(data_dir)
        child.kill()
        child.wait()
        AdapterRegistry(data_dir).close()


# --- kill -9 ---

PUBLISH_FOREVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from adapters.registry.registry import AdapterRegistry
from tests.test_registry import publish
registry = AdapterRegistry(Path(sys.argv[1]))
print("open", flush=True)
for i in range(10_000):
    publish(registry, f"n{i % 7}", f"round {sys.argv[3]} {i} " + "x" * 20_000, replace=True)
    if i % 5 == 4:
        registry.retire(f"n{i % 7}")
        registry.collect_garbage()
    if i % 3 == 2 and len(registry.history(f"n{(i - 1) % 7}")) > 1:
        registry.rollback(f"n{(i - 1) % 7}", None)
    print(i, flush=True)
"""


@pytest.mark.reliability("T10")
def test_kill_at_any_moment_leaves_adapters_absent_or_complete(data_dir: Path) -> None:
    root = str(Path(__file__).parents[1])
    moments = random.Random(0)
    for number in range(8):
        command = [sys.executable, "-c", PUBLISH_FOREVER, str(data_dir), root, str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            started, rounds = time.monotonic(), moments.randint(1, 20)
            for _ in range(rounds):
                child.stdout.readline()
            time.sleep(moments.random() * (time.monotonic() - started) / rounds)  # into the next
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        registry = AdapterRegistry(data_dir)
        held = {version.digest for _, history in state(registry) for version in history}
        assert registry.damaged == {}
        assert folders(registry) == held
        for digest in held:
            for file in FILES:
                assert digest_of((registry.store.path(digest) / file).read_text()) == digest
        assert list((data_dir / "store" / ".staging").iterdir()) == []
        registry.close()
    assert held


class Crash(BaseException):
    """End of the process: no handler of the registry may catch it and clean up."""


@pytest.mark.reliability("T10")
@pytest.mark.parametrize("step", range(7))
def test_a_crash_at_each_step_leaves_the_old_version(
    step: int, registry: AdapterRegistry, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 to 2 are the syncs before the rename, 3 and 4 those after it, 5 and 6 around the database's rows."""
    before, _ = publish(registry, "one", "v1")
    steps = iter(range(7))

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            if next(steps) == step:
                raise Crash
            return function(*arguments)

        return wrapper

    def point_and_crash(*arguments: Any) -> None:
        crashing(registry_db.point)(*arguments)
        crashing(lambda: None)()

    monkeypatch.setattr(store_module, "_fsync", crashing(store_module._fsync))
    monkeypatch.setattr(registry_module, "point", point_and_crash)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a dead process cleans nothing up
    with pytest.raises(Crash):
        publish(registry, "one", "v2", replace=True)
    monkeypatch.undo()
    again = reopened(registry, data_dir)
    assert again.resolve("one") == before
    assert folders(again) == {digest_of("v1")}
    assert list((data_dir / "store" / ".staging").iterdir()) == []
    again.close()


# --- threads and scale ---


def test_sixteen_threads(registry: AdapterRegistry, data_dir: Path) -> None:
    """Readers never see a partial write; the registry, its database and the disk agree afterwards."""

    def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(12):
            name = f"n{choose.randrange(4)}"
            try:
                action = choose.randrange(5)
                if action <= 1:
                    publish(registry, name, f"v{choose.randrange(6)}", replace=True)
                elif action == 2:
                    registry.rollback(name, None)
                elif action == 3:
                    registry.retire(name)
                else:
                    record = registry.resolve(name)
                    assert record.name == name and len(record.version.digest) == 64
                    registry.records(limit=2)
                    registry.collect_garbage(in_use=[record.version.digest])
            except (AdapterNotFound, AdapterConflict):
                continue

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work, number) for number in range(16)]:
            future.result()
    registry.collect_garbage()
    before = state(registry)
    assert folders(registry) == {version.digest for _, history in before for version in history}
    again = reopened(registry, data_dir)
    assert state(again) == before and again.damaged == {}
    again.close()


@pytest.mark.reliability("T12")
def test_one_of_many_first_publishers_wins(registry: AdapterRegistry) -> None:
    def attempt(number: int) -> bool:
        try:
            return publish(registry, "one", f"v{number % 17 if number < 16 else 0}")[1]
        except AdapterConflict:
            return False

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(attempt, range(32)))
    assert outcomes.count(True) == 1
    assert len(registry.history("one")) == 1
    registry.collect_garbage()
    assert folders(registry) == {registry.resolve("one").version.digest}


def add_names(data_dir: Path, digest: str, count: int) -> None:
    """Return the names that point to `digest` according to the tables. The registry must be closed."""
    db = sqlite3.connect(data_dir / registry_db.DATABASE)
    with db:
        db.executemany("INSERT INTO names VALUES (?, 0, 1)", [(f"n{i}",) for i in range(count)])
        db.executemany(
            "INSERT INTO history (name, digest, source, created, current) VALUES (?, ?, 'upload', 1, 1)",
            [(f"n{i}", digest) for i in range(count)],
        )
    db.close()


def test_ten_thousand_names_resolve_without_the_database(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    registry.close()
    add_names(data_dir, digest_of("v1"), 10_000)
    again = AdapterRegistry(data_dir)
    assert len(again) == 10_001 == len(again.names_of(digest_of("v1")))
    statements: list[str] = []
    again._db.set_trace_callback(statements.append)
    for i in range(10_000):
        assert again.resolve(f"n{i}").version.digest == digest_of("v1")
    assert [record.name for record in again.walk()] == sorted(["one", *(f"n{i}" for i in range(10_000))])
    assert statements == []
    again.close()


class Work:
    """The registry's work: SQLite instructions and file system calls."""

    def __init__(self, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: Counter[str] = Counter()
        registry._db.set_progress_handler(lambda: self.done.update(["hundred instructions"]), 100)
        registry._db.set_trace_callback(lambda _: self.done.update(["statements"]))
        for module, name in ((os, "scandir"), (os.path, "isfile"), (os, "fsync"), (registry_module, "read_entries")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.done[function.__name__] += 1
            return function(*arguments)

        return counted


def test_the_cost_of_a_change_does_not_grow_with_the_adapters(
    registry: AdapterRegistry, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "one", "v1")
    registry.close()

    def changes() -> Counter[str]:
        with closing(AdapterRegistry(data_dir)) as opened, monkeypatch.context() as patch:
            work = Work(opened, patch)
            publish(opened, "new", "v2")
            publish(opened, "new", "v3", replace=True)
            opened.rollback("new", None)
            opened.set_pinned("new", True)
            opened.retire("new")
            assert opened.collect_garbage() == sorted([digest_of("v2"), digest_of("v3")])
            return work.done

    changes()  # makes the store's folders, which stay
    alone = changes()
    add_names(data_dir, digest_of("v1"), 3000)
    among_many = changes()
    assert alone["statements"] and alone["isfile"] and alone["read_entries"]
    instructions = [done.pop("hundred instructions", 0) for done in (alone, among_many)]
    assert instructions[1] < instructions[0] + 10  # any look at all rows would take hundreds
    assert among_many == alone


# --- aliases ---


def test_an_alias_is_durable_and_is_no_adapter(registry: AdapterRegistry, data_dir: Path) -> None:
    for name in ("a", "b"):
        publish(registry, name, name)
    made = registry.split("prod", {"a": 90, "b": 10})
    assert registry.split("prod", {"a": 50, "b": 50}).created == made.created
    assert registry.aliases["prod"].weights == {"a": 50, "b": 50}
    with pytest.raises(AdapterNotFound):
        registry.resolve("prod")
    with pytest.raises(AdapterConflict, match="alias"):
        publish(registry, "prod", "c", replace=True)
    again = reopened(registry, data_dir)
    assert again.aliases == {"prod": Alias("prod", {"a": 50, "b": 50}, made.created)}
    again.unsplit("prod")
    with pytest.raises(AdapterNotFound):
        again.unsplit("prod")
    assert again.aliases == {} and publish(again, "prod", "c")[1]
    again.close()
    again = AdapterRegistry(data_dir)
    assert again.aliases == {} and again.resolve("prod")
    again.close()


def test_names_that_cannot_be_aliases(registry: AdapterRegistry) -> None:
    for name in ("a", "b"):
        publish(registry, name, name)
    registry.split("other", {"a": 1})
    registry.remember(PendingAdapter("awaited", "file:///x", False, False, 1))
    for name, members, refusal in (
        ("a", ["b"], AdapterConflict),
        ("base", ["b"], AdapterConflict),
        ("awaited", ["b"], AdapterConflict),
        ("../x", ["b"], InvalidName),
        ("prod", ["a", "gone"], AdapterNotFound),
        ("prod", ["other"], AdapterNotFound),
        ("other", ["other"], AdapterNotFound),
    ):
        with pytest.raises(refusal):
            registry.split(name, dict.fromkeys(members, 1))
    assert registry.aliases.keys() == {"other"} and registry.aliases["other"].weights == {"a": 1}
    with pytest.raises(AdapterConflict, match="alias"):
        registry.remember(PendingAdapter("other", "file:///x", False, False, 1))


def test_a_member_stays_while_an_alias_needs_it(registry: AdapterRegistry) -> None:
    for name in ("a", "b"):
        publish(registry, name, name)
    registry.split("prod", {"a": 1, "b": 0})
    for name in ("a", "b"):
        with pytest.raises(AdapterConflict, match="split"):
            registry.retire(name)
    registry.split("prod", {"a": 1})
    registry.retire("b")
    publish(registry, "a", "a2", replace=True)
    assert registry.rollback("a", None)


def test_a_database_without_aliases_opens_unchanged(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    before = state(registry)
    registry.close()
    spoil(data_dir, "DROP TABLE splits")
    again = AdapterRegistry(data_dir)
    assert state(again) == before and again.aliases == {}
    assert again._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    again.close()


# --- garbage ---


def test_files_of_a_lost_database_stay_when_an_upload_of_them_fails(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    registry.close()
    (data_dir / registry_db.DATABASE).write_bytes(b"garbage" * 1000)
    again = AdapterRegistry(data_dir)
    for content in ("v1", "v2"):
        with again.store.stage() as folder:
            for file in FILES:
                (folder / file).write_text(content)
            again.hold(digest_of(content), folder)
        again.release(digest_of(content))
    assert again.collect_garbage() == [digest_of("v2")]
    assert folders(again) == {digest_of("v1")}
    again.close()


# --- what is to be fetched ---


def pending(name: str, **fields: Any) -> PendingAdapter:
    return PendingAdapter(name, **{"source": "hf://org/a", "replacing": False, "pinned": True, "created": 7} | fields)


def test_pending_adapters_stay_across_restarts(registry: AdapterRegistry, data_dir: Path) -> None:
    failed = pending("two", error="gone", replacing=True, pinned=False)
    registry.remember(pending("two"))
    registry.remember(pending("one"))
    registry.remember(failed)
    again = reopened(registry, data_dir)
    assert again.pending == {"one": pending("one"), "two": failed}
    assert "one" not in again and len(again) == 0
    again.forget("two")
    again.forget("absent")
    last = reopened(again, data_dir)
    assert last.pending == {"one": pending("one")}
    last.close()


def test_a_published_adapter_is_no_longer_pending(registry: AdapterRegistry, data_dir: Path) -> None:
    for content in ("v1", "v1", "v2"):
        registry.remember(pending("one"))
        publish(registry, "one", content, replace=True)
        assert "one" in registry and not registry.pending
    registry.remember(pending("one"))
    with pytest.raises(AdapterConflict):
        publish(registry, "one", "v3")
    again = reopened(registry, data_dir)
    assert again.pending == {"one": pending("one")}
    again.close()


def test_only_publishable_names_can_be_pending(registry: AdapterRegistry) -> None:
    for name, error in (("base", AdapterConflict), ("../x", InvalidName)):
        with pytest.raises(error):
            registry.remember(pending(name))
    assert not registry.pending


def test_a_database_without_pending_adapters_gets_their_table(registry: AdapterRegistry, data_dir: Path) -> None:
    publish(registry, "one", "v1")
    registry.close()
    spoil(data_dir, "DROP TABLE pending")
    again = AdapterRegistry(data_dir)
    again.remember(pending("two"))
    assert again.resolve("one") and list(again.pending) == ["two"]
    again.close()

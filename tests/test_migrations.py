"""Databases of every earlier schema open with all that they have, or stay as they are."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterError
from adapters.peft.files import FILES
from adapters.registry import migrations
from adapters.registry.aliases import Alias
from adapters.registry.db import DATABASE
from adapters.registry.migrations import MIGRATIONS, SCHEMA_VERSION, Migration
from adapters.registry.registry import AdapterRegistry
from adapters.registry.store import AdapterStore
from tests.test_registry import digest_of, pending, publish, spoil, state

OLD, NEW = digest_of("v1"), digest_of("v2")
# Schema 1 as it was first released, and what was added to it without a new number.
FIRST = f"""
CREATE TABLE versions (digest TEXT PRIMARY KEY, rank INTEGER NOT NULL, target_modules TEXT NOT NULL,
    nbytes INTEGER NOT NULL, created INTEGER NOT NULL, report TEXT NOT NULL) STRICT;
CREATE TABLE names (name TEXT PRIMARY KEY, pinned INTEGER NOT NULL, created INTEGER NOT NULL) STRICT;
CREATE TABLE history (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, digest TEXT NOT NULL,
    source TEXT NOT NULL, created INTEGER NOT NULL, current INTEGER NOT NULL, UNIQUE (name, digest)) STRICT;
PRAGMA user_version = 1;
INSERT INTO versions VALUES ('{OLD}', 8, '["q_proj"]', 100, 5, '{{"features": []}}');
INSERT INTO versions VALUES ('{NEW}', 4, '["v_proj"]', 50, 6, '{{}}');
INSERT INTO names VALUES ('one', 1, 5), ('two', 0, 6);
INSERT INTO history (name, digest, source, created, current) VALUES
    ('one', '{OLD}', 'upload', 5, 0), ('one', '{NEW}', 'hf://org/a', 6, 1), ('two', '{OLD}', 'upload', 6, 1);
"""
INDEX = "CREATE INDEX history_digest ON history (digest);"
PENDING = """
CREATE TABLE pending (name TEXT PRIMARY KEY, source TEXT NOT NULL, replacing INTEGER NOT NULL,
    pinned INTEGER NOT NULL, created INTEGER NOT NULL, error TEXT) STRICT;
INSERT INTO pending VALUES ('awaited', 'hf://org/a', 0, 1, 7, NULL);
"""
ALIASES = """
CREATE TABLE aliases (alias TEXT NOT NULL, member TEXT NOT NULL, weight INTEGER NOT NULL, created INTEGER NOT NULL,
    PRIMARY KEY (alias, member)) STRICT;
INSERT INTO aliases VALUES ('prod', 'one', 9, 8), ('prod', 'two', 1, 8);
"""
CHECKS = f"""
CREATE TABLE checks (digest TEXT PRIMARY KEY, checked INTEGER NOT NULL, damage TEXT) STRICT;
INSERT INTO checks VALUES ('{OLD}', 9, 'its stored files are damaged'), ('{NEW}', 9, NULL);
PRAGMA user_version = 2;
"""
# Schema 3 put another table in the place of `aliases`.
SPLITS = """
DROP TABLE aliases;
CREATE TABLE splits (alias TEXT NOT NULL, member TEXT NOT NULL, weight ANY NOT NULL, created INTEGER NOT NULL,
    PRIMARY KEY (alias, member)) STRICT;
INSERT INTO splits VALUES ('prod', 'one', 9, 8), ('prod', 'two', 1, 8);
PRAGMA user_version = 3;
"""
SETTINGS = """
CREATE TABLE settings (name TEXT NOT NULL, pending INTEGER NOT NULL, settings TEXT NOT NULL,
    PRIMARY KEY (name, pending)) STRICT;
INSERT INTO settings VALUES ('one', 0, '{"description": "first"}'), ('awaited', 1, '{"labels": {"a": "b"}}');
PRAGMA user_version = 4;
"""
EARLIER = {
    "1": FIRST,
    "1 with an index": FIRST + INDEX,
    "1 with pending adapters": FIRST + INDEX + PENDING,
    "1 with aliases": FIRST + INDEX + PENDING + ALIASES,
    "2": FIRST + INDEX + PENDING + ALIASES + CHECKS,
    "3": FIRST + INDEX + PENDING + ALIASES + CHECKS + SPLITS,
    "4": FIRST + INDEX + PENDING + ALIASES + CHECKS + SPLITS + SETTINGS,
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def written(data_dir: Path, script: str) -> Path:
    """Write a database and the files of its versions."""
    store = AdapterStore(_made(data_dir) / "store")
    for content in ("v1", "v2"):
        with store.stage() as folder:
            for file in FILES:
                (folder / file).write_text(content)
            store.commit(folder, digest_of(content))
    path = data_dir / DATABASE
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    return path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def schema(path: Path) -> tuple[int, dict[str, list[Any]]]:
    """Return the schema's number, and the columns of each table and index."""
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")]
        columns = {name: db.execute(f"SELECT * FROM pragma_table_xinfo('{name}')").fetchall() for name in names}
        return db.execute("PRAGMA user_version").fetchone()[0], columns


@pytest.mark.reliability("T13")
@pytest.mark.parametrize("earlier", EARLIER)
def test_every_earlier_schema_opens_with_all_that_it_has(earlier: str, data_dir: Path, tmp_path: Path) -> None:
    path = written(data_dir, EARLIER[earlier])
    for _ in range(2):  # the second start has nothing to change
        registry = AdapterRegistry(data_dir)
        one, two = registry.record("one"), registry.record("two")
        assert (one.version.digest, one.version.rank, one.version.target_modules) == (NEW, 4, ("v_proj",))
        assert (one.pinned, one.source, one.created) == (True, "hf://org/a", 5)
        assert [(v.digest, v.created, v.current) for v in registry.history("one")] == [(NEW, 6, True), (OLD, 5, False)]
        assert two.source == "upload"
        has_settings = SETTINGS in EARLIER[earlier]
        assert one.settings == ({"description": "first"} if has_settings else {}) and two.settings == {}
        awaited = replace(pending("awaited"), settings_json='{"labels": {"a": "b"}}' if has_settings else "")
        assert registry.pending == ({"awaited": awaited} if PENDING in EARLIER[earlier] else {})
        aliases = {"prod": Alias("prod", {"one": 9, "two": 1}, 8)} if ALIASES in EARLIER[earlier] else {}
        assert registry.aliases == aliases
        assert list(registry.damaged) == (["two"] if CHECKS in EARLIER[earlier] else [])
        publish(registry, "three", "v3")
        registry.close()
    AdapterRegistry(tmp_path / "fresh").close()
    assert schema(path) == schema(tmp_path / "fresh" / DATABASE)
    assert schema(path)[0] == SCHEMA_VERSION


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_copy_from_before_the_change_lies_beside_it(earlier: str, data_dir: Path) -> None:
    path = written(data_dir, EARLIER[earlier])
    before = schema(path)
    AdapterRegistry(data_dir).close()
    copy = path.with_name(f"{DATABASE}.schema-{before[0]}")
    assert copy.exists() == (before[0] < SCHEMA_VERSION)
    if copy.exists():
        assert schema(copy) == before
        with closing(sqlite3.connect(copy)) as db:
            assert db.execute("SELECT count(*) FROM history").fetchone()[0] == 3
    assert not list(data_dir.glob("*.part"))


def test_a_new_folder_needs_no_copy(data_dir: Path) -> None:
    AdapterRegistry(data_dir).close()
    assert not list(data_dir.glob(f"{DATABASE}.schema-*"))


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a step whose last statement fails."""
    bad = Migration(SCHEMA_VERSION + 1, "CREATE TABLE more (a) STRICT; INSERT INTO names VALUES (1);")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, bad))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", SCHEMA_VERSION + 1)


def test_a_step_that_fails_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(data_dir, EARLIER["1 with aliases"])
    before = schema(path)
    with monkeypatch.context() as patch:
        failing(patch)
        with pytest.raises(sqlite3.Error):
            AdapterRegistry(data_dir)
    assert schema(path) == before
    registry = AdapterRegistry(data_dir)  # the lock was released
    assert registry.resolve("one").version.digest == NEW
    registry.close()


def test_a_step_runs_once(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later step may change columns; it is not run on a database that has it."""
    written(data_dir, EARLIER["1"])
    more = Migration(SCHEMA_VERSION + 1, "ALTER TABLE names ADD COLUMN note TEXT;")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*MIGRATIONS, more))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    for _ in range(2):
        AdapterRegistry(data_dir).close()


@pytest.mark.parametrize("number", [SCHEMA_VERSION + 1, 99, -1])
def test_an_unknown_schema_is_refused_with_what_to_do_and_left_as_it_is(number: int, data_dir: Path) -> None:
    path = written(data_dir, EARLIER["2"])
    spoil(data_dir, f"PRAGMA user_version = {number}")
    before = path.read_bytes(), sorted(file.name for file in data_dir.iterdir())
    with pytest.raises(AdapterError, match=rf"schema {number}; this version reads up to {SCHEMA_VERSION}") as refused:
        AdapterRegistry(data_dir)
    assert "Start that version again" in str(refused.value) and f"{DATABASE}.schema-" in str(refused.value)
    (data_dir / "lock").unlink()
    assert (path.read_bytes(), sorted(file.name for file in data_dir.iterdir())) == before


def test_steps_are_numbered_in_order() -> None:
    assert [step.number for step in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_kill_between_copy_and_change_is_made_good(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(data_dir, EARLIER["1"])
    copied: Callable[..., None] = migrations._copy

    class Crash(BaseException):
        pass

    def crash(*arguments: Any) -> None:
        copied(*arguments)
        raise Crash

    monkeypatch.setattr(migrations, "_copy", crash)
    with pytest.raises(Crash):
        AdapterRegistry(data_dir)
    monkeypatch.undo()
    assert schema(path)[0] == 1
    started = time.time()
    registry = AdapterRegistry(data_dir)
    assert len(state(registry)) == 2 and time.time() - started < 10
    registry.close()

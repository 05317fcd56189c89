"""Schema of the registry's database by number, and the steps that lead from each number to the next.

A step is SQL and is never changed once it was released. All due steps run in one transaction, after a copy of the
database was written beside it. A database of a newer server is refused.
"""

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Migration:
    """The step to schema `number`. With `creates_only`, the step creates what is missing and changes nothing else; such
    steps also put back tables that a database has lost."""

    number: int
    sql: str
    creates_only: bool = False


_FIRST = """
CREATE TABLE IF NOT EXISTS versions (
    digest TEXT PRIMARY KEY,
    rank INTEGER NOT NULL,
    target_modules TEXT NOT NULL,  -- JSON list
    nbytes INTEGER NOT NULL,
    created INTEGER NOT NULL,
    report TEXT NOT NULL           -- JSON object
) STRICT;
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY,
    pinned INTEGER NOT NULL,
    created INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS history (  -- versions that each name has pointed to; the highest id is the latest
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    source TEXT NOT NULL,
    created INTEGER NOT NULL,
    current INTEGER NOT NULL,         -- 1 in exactly one row per name
    UNIQUE (name, digest)
) STRICT;
CREATE INDEX IF NOT EXISTS history_digest ON history (digest);
CREATE TABLE IF NOT EXISTS pending (  -- adapters that are requested and not fetched yet, or failed to be
    name TEXT PRIMARY KEY,
    source TEXT NOT NULL,
    replacing INTEGER NOT NULL,
    pinned INTEGER NOT NULL,
    created INTEGER NOT NULL,
    error TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS aliases (
    alias TEXT NOT NULL,
    member TEXT NOT NULL,
    weight INTEGER NOT NULL,
    created INTEGER NOT NULL,
    PRIMARY KEY (alias, member)
) STRICT;
"""
_CHECKS = """
CREATE TABLE IF NOT EXISTS checks (  -- the last comparison of a version's stored files with its digest
    digest TEXT PRIMARY KEY,
    checked INTEGER NOT NULL,        -- in Unix seconds
    damage TEXT                      -- why the version cannot be served, or NULL
) STRICT;
"""
_SPLITS = """
CREATE TABLE IF NOT EXISTS splits (  -- in place of `aliases`, whose weights were whole numbers
    alias TEXT NOT NULL,
    member TEXT NOT NULL,  -- an adapter, or '' for the base model
    weight ANY NOT NULL,   -- a number, 0 or more
    created INTEGER NOT NULL,  -- the alias, not the member
    PRIMARY KEY (alias, member)
) STRICT;
INSERT OR IGNORE INTO splits SELECT alias, member, weight, created FROM aliases;
DROP TABLE aliases;
"""
_SETTINGS = """
CREATE TABLE IF NOT EXISTS settings (  -- of names; the versions of a name share them
    name TEXT NOT NULL,
    pending INTEGER NOT NULL,  -- 1: of a name in `pending`, which are changes until it is published
    settings TEXT NOT NULL,    -- JSON object
    PRIMARY KEY (name, pending)
) STRICT;
"""
MIGRATIONS = (
    Migration(1, _FIRST, creates_only=True),
    Migration(2, _CHECKS, creates_only=True),
    Migration(3, _SPLITS, creates_only=True),  # what the first step creates again is empty
    Migration(4, _SETTINGS, creates_only=True),
)
SCHEMA_VERSION = MIGRATIONS[-1].number


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the database, which lies at `path`, to the newest schema in one transaction. Raises `AdapterError` when a
    newer server wrote it."""
    found = schema_of(db)
    check_readable(found, path)
    if 0 < found < SCHEMA_VERSION:
        _copy(db, path.with_name(f"{path.name}.schema-{found}"))
    due = [step for step in MIGRATIONS if step.number > found or step.creates_only]
    statements = "\n".join(step.sql for step in due)
    try:
        db.executescript(f"BEGIN IMMEDIATE;\n{statements}\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;")
    except BaseException:
        if db.in_transaction:
            db.rollback()
        raise


def schema_of(db: sqlite3.Connection) -> int:
    """Return the schema number of a database; 0 if it is new."""
    number: int = db.execute("PRAGMA user_version").fetchone()[0]
    return number


def check_readable(found: int, path: Path) -> None:
    """Raise `AdapterError` for a schema number that this server does not know."""
    if 0 <= found <= SCHEMA_VERSION:
        return
    raise AdapterError(
        f"The registry was written by a newer version of this server (schema {found}; this version reads up to "
        f"{SCHEMA_VERSION}), and is left as it is. Start that version again, or stop the server and put the copy "
        f"that it made before the change, '{path.name}.schema-<number>', in place of '{path.name}'; adapters published "
        f"since then are lost with it."
    )


def _copy(db: sqlite3.Connection, place: Path) -> None:
    """Write a copy of the database to `place`, which has either all of it or does not change."""
    draft = place.with_name(place.name + ".part")
    draft.unlink(missing_ok=True)
    with closing(sqlite3.connect(draft)) as copy:
        db.backup(copy)
    handle = os.open(draft, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(draft, place)

"""The registry's tables in SQLite, and how records are read from them.

An invalid row damages only the adapter that it belongs to; a file that is not a sound database is set aside.
"""

import json
import logging
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from adapters.errors import NoSpace
from adapters.fault_points import fault_point
from adapters.records import AdapterRecord, AdapterVersion, Entry, HistoryEntry, PendingAdapter
from adapters.registry.migrations import check_readable, migrate, schema_of
from adapters.registry.store import AdapterStore

DATABASE = "registry.sqlite3"
_DAMAGED = ".damaged-"

log = logging.getLogger(__name__)

_ROWS = """
SELECT names.name, names.pinned, names.created AS named, history.digest, history.source,
       history.created AS published, history.current, versions.rank, versions.target_modules, versions.nbytes,
       versions.created, versions.report, checks.damage, settings.settings
FROM names LEFT JOIN history ON history.name = names.name LEFT JOIN versions ON versions.digest = history.digest
     LEFT JOIN checks ON checks.digest = history.digest
     LEFT JOIN settings ON settings.name = names.name AND settings.pending = 0
{where} ORDER BY names.name, history.id DESC
"""


def connect(data_dir: Path, store: AdapterStore) -> sqlite3.Connection:
    """Open or create the registry's database; a file that is not a sound database is renamed to `….damaged-<time>`, and
    a lost one leaves an empty file of that name.

    Raises `AdapterError` when a newer server wrote it.
    """
    path = data_dir / DATABASE
    is_lost = not path.exists() or path.stat().st_size == 0
    if is_lost and not was_set_aside(data_dir) and store.digests():
        path.touch()  # SQLite would treat an absent or empty file as a new database
        _set_aside(data_dir, "it is empty or absent, and the store has adapters")
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if _code(error) not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise
        reason = str(error)
    _set_aside(data_dir, reason)
    return _open(path)


def _set_aside(data_dir: Path, reason: str) -> None:
    suffix = f"{_DAMAGED}{time.time_ns()}"
    for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
        with suppress(FileNotFoundError):
            (data_dir / name).rename(data_dir / (name + suffix))
    log.error(
        "the registry is damaged (%s) and was put aside as %s; the server starts without the adapters that it listed. "
        "Their files stay in the store: stop the server and run `loraplex registry rebuild`",
        reason,
        DATABASE + suffix,
    )


def set_aside_files(data_dir: Path) -> list[Path]:
    """Return the damaged databases beside the live one, oldest first; each may be the only record of some stored
    adapters."""
    return sorted(data_dir.glob(f"{DATABASE}{_DAMAGED}*"))


def was_set_aside(data_dir: Path) -> bool:
    """Return True if a damaged database lies beside the live one."""
    return bool(set_aside_files(data_dir))


def mark_rebuilt(data_dir: Path) -> None:
    """Rename the damaged databases: the live one has every stored adapter again."""
    for path in data_dir.glob(f"{DATABASE}*{_DAMAGED}*"):
        path.rename(path.with_name(path.name.replace(_DAMAGED, ".rebuilt-")))


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        db.text_factory = _decode
        check_readable(schema_of(db), path)  # a newer server's database is not written to
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        _check_sound(db)
        migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")  # a flipped bit damages one value, not the whole query


def _check_sound(db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        error = sqlite3.DatabaseError(found)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _code(error: sqlite3.Error) -> int | None:
    return getattr(error, "sqlite_errorcode", None)  # absent if Python's module, not SQLite, raised the error


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the body as one transaction, durable on exit; an exception rolls it back. Raises `NoSpace` when the disk
    is full."""
    try:
        with db:
            yield
            fault_point("registry.writing")
        fault_point("registry.committed")
    except sqlite3.OperationalError as error:
        if _code(error) == sqlite3.SQLITE_FULL:
            raise NoSpace("The server has no space left for adapters.") from error
        raise


def point(db: sqlite3.Connection, name: str, version: AdapterVersion, source: str, pinned: bool, retain: int) -> None:
    """Make `version` the newest and current version of `name`, which keeps its `retain` newest versions. Call in a
    transaction."""
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET rank = excluded.rank, "
        "target_modules = excluded.target_modules, nbytes = excluded.nbytes, report = excluded.report",
        (
            version.digest,
            version.rank,
            json.dumps(version.target_modules),
            version.nbytes,
            version.created,
            version.report_json,
        ),
    )
    db.execute(
        "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET pinned = pinned OR excluded.pinned",
        (name, pinned, version.created),
    )
    db.execute("UPDATE history SET current = 0 WHERE name = ?", (name,))
    # A version published again under the name gets a new row in place of its old one.
    db.execute(
        "INSERT OR REPLACE INTO history (name, digest, source, created, current) VALUES (?, ?, ?, ?, 1)",
        (name, version.digest, source, version.created),
    )
    db.execute(
        "DELETE FROM history WHERE name = ? AND id NOT IN "
        "(SELECT id FROM history WHERE name = ? ORDER BY id DESC LIMIT ?)",
        (name, name, retain),
    )


def delete_name(db: sqlite3.Connection, name: str) -> None:
    """Delete a name and its history, durably."""
    with transaction(db):
        db.execute("DELETE FROM names WHERE name = ?", (name,))
        db.execute("DELETE FROM history WHERE name = ?", (name,))
        write_settings(db, name, "")


def write_pending(db: sqlite3.Connection, pending: PendingAdapter) -> None:
    """Write a pending adapter, durably, replacing any of the same name."""
    with transaction(db):
        values = ":name, :source, :replacing, :pinned, :created, :error"
        db.execute(f"INSERT OR REPLACE INTO pending VALUES ({values})", asdict(pending))
        write_settings(db, pending.name, pending.settings_json, pending=True)


def delete_pending(db: sqlite3.Connection, name: str) -> None:
    """Delete a pending adapter. Call in a transaction."""
    db.execute("DELETE FROM pending WHERE name = ?", (name,))
    write_settings(db, name, "", pending=True)


def write_settings(db: sqlite3.Connection, name: str, settings: str, *, pending: bool = False) -> None:
    """Replace the settings of a name, or of a pending adapter; "" deletes them. Call in a transaction."""
    db.execute("DELETE FROM settings WHERE name = ? AND pending = ?", (name, pending))
    if settings:
        db.execute("INSERT INTO settings VALUES (?, ?, ?)", (name, pending, settings))


def update_report(db: sqlite3.Connection, digest: str, report: str) -> None:
    """Replace the report of a version. Call in a transaction."""
    db.execute("UPDATE versions SET report = ? WHERE digest = ?", (report, digest))


def read_entries(db: sqlite3.Connection, store: AdapterStore, name: str | None = None) -> dict[str, Entry]:
    """Read the entry of `name`, if there is one, or all entries, by name."""
    query = _ROWS.format(where="WHERE names.name = ?" if name else "")
    with closing(db.execute(query, (name,) if name else ())) as cursor:
        return {key: _entry(list(rows), store) for key, rows in groupby(cursor, key=itemgetter("name"))}


def stored_bytes(db: sqlite3.Connection) -> int:
    """Return the bytes of the weights of all versions."""
    return int(db.execute("SELECT COALESCE(SUM(nbytes), 0) FROM versions").fetchone()[0])


def names_with(db: sqlite3.Connection, digest: str) -> list[str]:
    """Return the names whose history has the version."""
    return [row["name"] for row in db.execute("SELECT name FROM history WHERE digest = ? ORDER BY name", (digest,))]


def write_check(db: sqlite3.Connection, digest: str, checked: int, damage: str | None) -> None:
    """Record the result of a comparison of the stored files with their digest. Call in a transaction."""
    db.execute("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", (digest, checked, damage))


def read_damage(db: sqlite3.Connection, digest: str) -> str | None:
    """Return what the last check found wrong with the stored files, or None."""
    row = db.execute("SELECT damage FROM checks WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else row["damage"]


def read_checks(db: sqlite3.Connection, before: int) -> list[str]:
    """Return the versions in a name's history that were not checked since `before`, in Unix seconds, oldest check
    first."""
    query = """
        SELECT history.digest FROM history LEFT JOIN checks ON checks.digest = history.digest
        WHERE COALESCE(checks.checked, 0) < ? GROUP BY history.digest
        ORDER BY COALESCE(checks.checked, 0), history.digest
    """
    return [row["digest"] for row in db.execute(query, (before,))]


def read_pending(db: sqlite3.Connection) -> dict[str, PendingAdapter]:
    """Read all pending adapters by name, oldest first."""
    rows = db.execute(
        "SELECT pending.*, COALESCE(settings.settings, '') AS settings_json FROM pending "
        "LEFT JOIN settings ON settings.name = pending.name AND settings.pending = 1 ORDER BY created, pending.name"
    )
    return {row["name"]: _pending(row) for row in rows}


def _pending(row: sqlite3.Row) -> PendingAdapter:
    flags = {flag: bool(row[flag]) for flag in ("replacing", "pinned")}
    return PendingAdapter(**{**dict(row), **flags})


def _entry(rows: list[sqlite3.Row], store: AdapterStore) -> Entry:
    current = next((row for row in rows if row["current"]), rows[0])
    records: dict[str, AdapterRecord] = {}
    damages: dict[str, str] = {}
    for row in rows:
        try:
            records[row["digest"]] = _record(row, _stored_version(row, store))
        except _Damaged as damage:
            damages[row["digest"]] = str(damage)
    nothing = AdapterVersion(current["digest"] or "", rank=0, target_modules=(), nbytes=0, created=0, report_json="{}")
    return Entry(
        record=records.get(current["digest"]) or _record(current, nothing),
        versions=tuple(records.values()),
        history=tuple(
            HistoryEntry(row["digest"], row["published"], bool(row["current"])) for row in rows if row["digest"]
        ),
        damage=damages.get(current["digest"]),
    )


class _Damaged(Exception):
    """The reason why one version of an adapter cannot be served."""


def _stored_version(row: sqlite3.Row, store: AdapterStore) -> AdapterVersion:
    try:
        targets, report = _targets(row["target_modules"]), row["report"]
        if not all(isinstance(json.loads(text), dict) for text in (report, row["settings"] or "{}")):
            raise ValueError("a report is an object, and so are settings")
        stored = row["digest"] in store
    except (TypeError, ValueError):
        raise _Damaged("its row in the registry cannot be read") from None
    if not stored:
        raise _Damaged("its files are missing from the store")
    if row["damage"] is not None:
        raise _Damaged(row["damage"])
    return AdapterVersion(row["digest"], row["rank"], targets, row["nbytes"], row["created"], report)


@lru_cache(maxsize=256)
def _targets(text: str) -> tuple[str, ...]:
    """Parse a list of modules. Thousands of adapters share few such lists, hence the cache."""
    return tuple(json.loads(text))


def _record(row: sqlite3.Row, version: AdapterVersion) -> AdapterRecord:
    source = sys.intern(row["source"] or "")  # mostly "upload"
    return AdapterRecord(row["name"], version, source, bool(row["pinned"]), row["named"], row["settings"] or "")

"""The usage ledger: requests and tokens by day (UTC), API key and adapter, in a small SQLite file of the data folder.

Requests add to a dict, and a background task writes the sums every few seconds, so that no request waits for the disk.
A crash loses at most what was added since.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

FILE = "usage.sqlite3"
DAYS_KEPT = 400
ROWS_A_DAY = 4096  # of one day; what is used past them counts under `OTHER`
OTHER = "_other"
FLUSH_SECONDS = 10.0

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT, key TEXT, adapter TEXT, requests INTEGER, prompt_tokens INTEGER, generated_tokens INTEGER,
    PRIMARY KEY (day, key, adapter)
) WITHOUT ROWID
"""
_ADD = """
UPDATE usage SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, generated_tokens = generated_tokens + ?
WHERE day = ? AND key = ? AND adapter = ?
"""


class Counts(NamedTuple):
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Row(NamedTuple):
    day: str
    key: str
    adapter: str


class UsageLedger:
    """The ledger of one data folder, or in memory alone without a folder. `add` belongs to the event loop."""

    def __init__(self, folder: Path | None = None):
        self._path = None if folder is None else folder / FILE
        self._pending: dict[Row, Counts] = {}
        self._open: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._has_failed = False

    def add(self, key: str, adapter: str, counts: Counts) -> None:
        row = Row(_day(time.time()), key, adapter)
        self._pending[row] = self._pending.get(row, Counts()).plus(counts)

    async def follow(self) -> None:
        """Write what was added every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what was added. What cannot be written, for example to a full disk, is tried again later."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        try:
            await asyncio.to_thread(self._write, pending)
            self._has_failed = False
        except (sqlite3.Error, OSError) as error:
            if not self._has_failed:
                log.warning("the usage ledger cannot be written and is tried again: %s", error)
            self._has_failed = True
            for row, counts in pending.items():
                self._pending[row] = self._pending.get(row, Counts()).plus(counts)

    async def between(self, first: date, last: date) -> list[tuple[Row, Counts]]:
        """Return the rows of these days, both included, in their order. Raises `sqlite3.Error`."""
        await self.flush()
        return await asyncio.to_thread(self._read, first.isoformat(), last.isoformat())

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _write(self, pending: Mapping[Row, Counts]) -> None:
        oldest = (datetime.now(UTC).date() - timedelta(days=DAYS_KEPT)).isoformat()
        with self._lock, self._database() as database:
            for row, counts in pending.items():
                _add(database, row, counts)
            database.execute("DELETE FROM usage WHERE day < ?", (oldest,))

    def _read(self, first: str, last: str) -> list[tuple[Row, Counts]]:
        query = "SELECT * FROM usage WHERE day BETWEEN ? AND ? ORDER BY day, key, adapter"
        with self._lock:
            return list(_parsed(self._database().execute(query, (first, last))))

    def _database(self) -> sqlite3.Connection:
        if self._open is None:
            try:
                self._open = _connect(self._path)
            except sqlite3.DatabaseError as error:
                if self._path is None or error.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                    raise
                _set_aside(self._path, error)
                self._open = _connect(self._path)
        return self._open


def _day(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def _connect(path: Path | None) -> sqlite3.Connection:
    database = sqlite3.connect(path or ":memory:", check_same_thread=False)
    try:
        database.execute(_TABLE)
    except BaseException:
        database.close()
        raise
    return database


def _set_aside(path: Path, error: Exception) -> None:
    target = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    log.error("the usage ledger is damaged (%s); it is kept as %s, and a new one begins", error, target.name)
    with suppress(FileNotFoundError):
        path.rename(target)


def _add(database: sqlite3.Connection, row: Row, counts: Counts) -> None:
    if database.execute(_ADD, (*counts, *row)).rowcount:
        return
    (rows,) = database.execute("SELECT count(*) FROM usage WHERE day = ?", (row.day,)).fetchone()
    if rows >= ROWS_A_DAY and row.adapter != OTHER:
        _add(database, row._replace(adapter=OTHER), counts)
    else:
        database.execute("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?)", (*row, *counts))


def _parsed(found: sqlite3.Cursor) -> Iterator[tuple[Row, Counts]]:
    for values in found:
        yield Row(*values[:3]), Counts(*values[3:])

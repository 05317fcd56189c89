"""Condition of a data folder, read without its lock, so that a running server is not disturbed."""

import fcntl
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from adapters.registry.db import DATABASE, set_aside_files
from adapters.registry.journal import Journal
from adapters.registry.migrations import SCHEMA_VERSION, schema_of
from adapters.registry.store import AdapterStore


def condition(data_dir: Path) -> dict[str, str]:
    """Describe the registry and the store of `data_dir` for an operator. Nothing is changed."""
    if not data_dir.is_dir():
        return {"folder": f"{data_dir} does not exist"}
    noted = Journal(data_dir).read()
    stored = set(AdapterStore.digests_in(data_dir / "store"))
    rows, named = _registry(data_dir / DATABASE)
    unnamed = len(stored - named) if named is not None else len(stored)
    aside = [path.name for path in set_aside_files(data_dir)]
    return {
        "folder": str(data_dir),
        "in use by": _holder(data_dir / "lock"),
        **rows,
        "damaged registries put aside": ", ".join(aside) or "none",
        "stored versions": f"{len(stored)}, of which {unnamed} have no name in the registry",
        "journal of names": f"{sum(bool(line['versions']) for line in noted.names.values())} names"
        + (f", {noted.unreadable} lines cannot be read" if noted.unreadable else ""),
        "what to do": "stop the server and run `loraplex registry rebuild`" if aside or named is None else "nothing",
    }


def _registry(path: Path) -> tuple[dict[str, str], set[str] | None]:
    """Return rows about the database, and the digests that it names; None if it cannot be read."""
    if not path.exists():
        return {"registry": "none"}, set()
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as db:
            schema = schema_of(db)
            sound = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if sound != "ok":
                return {"registry": f"damaged: {sound}"}, None
            named = {row[0] for row in db.execute("SELECT digest FROM history")}
            names = db.execute("SELECT count(*) FROM names").fetchone()[0]
            damaged = _damaged(db) if schema >= 2 else []
    except sqlite3.Error as error:
        return {"registry": f"damaged: {error}"}, None
    return {
        "registry": f"{names} adapters, schema {schema} (this version reads up to {SCHEMA_VERSION})",
        "damaged adapters": ", ".join(damaged) or "none known",
    }, named


def _damaged(db: sqlite3.Connection) -> list[str]:
    query = """
        SELECT DISTINCT history.name FROM history JOIN checks ON checks.digest = history.digest
        WHERE history.current AND checks.damage IS NOT NULL ORDER BY history.name
    """
    return [row[0] for row in db.execute(query)]


def _holder(path: Path) -> str:
    """Return the process that holds the lock, or "no server"."""
    with suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"process {os.pread(handle, 20, 0).decode(errors='replace').strip()}"
        finally:
            os.close(handle)
    return "no server"

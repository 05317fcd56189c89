"""Which stored versions nobody needs any more, without looking at all that are needed."""

import sqlite3
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from adapters.registry.db import transaction
from adapters.registry.store import AdapterStore


class Garbage:
    """Versions are loose from when they are stored, or leave a name's history, until a history has them.

    One caller at a time. Only loose versions are ever looked at, so what a collection costs does not depend on how
    many adapters there are.
    """

    def __init__(self, db: sqlite3.Connection, store: AdapterStore, *, keep_orphans: bool):
        """Files that no row knows are left by a crash. With `keep_orphans` they may be all that is left of what a
        damaged database named, and are not touched."""
        self._db = db
        self._store = store
        self._held: Counter[str] = Counter()
        rows = {row["digest"] for row in db.execute("SELECT digest FROM versions")}
        named = {row["digest"] for row in db.execute("SELECT digest FROM history")}
        self._loose = (rows if keep_orphans else rows.union(store.digests())) - named

    def admit(self, folder: Path, digest: str) -> None:
        """Store the staged `folder`, loose for now; what is there already stays what it is. Raises `NoSpace`."""
        if digest not in self._store:
            self._loose.add(digest)
        self._store.admit(folder, digest)

    def hold(self, digest: str) -> None:
        """Keep `digest` until `let_go`, loose or not."""
        self._held[digest] += 1

    def let_go(self, digest: str) -> None:
        self._held[digest] -= 1

    def left(self, digests: Collection[str]) -> None:
        """A name's history lost these."""
        self._loose.update(digests)

    def collect(self, in_use: Collection[str]) -> list[str]:
        """Delete what is loose and neither held nor `in_use`; returns their digests, sorted. Raises `NoSpace`."""
        self._held = +self._held  # without those that nobody holds any more
        self._loose = {digest for digest in self._loose if not self._is_named(digest)}
        garbage = sorted(self._loose.difference(in_use, self._held))
        if garbage:
            with transaction(self._db):
                self._db.executemany("DELETE FROM versions WHERE digest = ?", [(digest,) for digest in garbage])
        for digest in garbage:
            self._store.delete(digest)
        self._loose.difference_update(garbage)
        return garbage

    def _is_named(self, digest: str) -> bool:
        return self._db.execute("SELECT 1 FROM history WHERE digest = ?", (digest,)).fetchone() is not None

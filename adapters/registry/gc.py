"""Garbage collection of stored versions, at a cost independent of the number of versions in use."""

import sqlite3
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from adapters.registry.db import transaction
from adapters.registry.store import AdapterStore

Stored = Literal["new", "healed", "same"]  # whether a version was stored just now, replaced damaged files, or was there


class GarbageCollector:
    """Deletes stored versions that no name's history references.

    A version becomes a candidate when it is stored and when it leaves a name's history; a version in a history is
    dropped from the candidates at the next collection. Only candidates are examined, so the cost of a collection does
    not depend on the number of adapters. One caller at a time.
    """

    def __init__(self, db: sqlite3.Connection, store: AdapterStore, *, keep_orphans: bool):
        """Take all unreferenced rows as candidates, and files without a row, which a crash leaves behind. With
        `keep_orphans` such files are not candidates: they may be all that remains of the adapters of a damaged
        database."""
        self._db = db
        self._store = store
        self._held: Counter[str] = Counter()
        rows = {row["digest"] for row in db.execute("SELECT digest FROM versions")}
        named = {row["digest"] for row in db.execute("SELECT digest FROM history")}
        self._candidates = (rows if keep_orphans else rows.union(store.digests())) - named

    def commit(self, folder: Path, digest: str) -> Stored:
        """Store the staged `folder` as a candidate; damaged files of the same digest are replaced. Raises `NoSpace`."""
        if self._held[digest] > 0 and digest in self._store:
            return "same"  # compared or written by `hold`
        if digest in self._store:
            return "healed" if self._store.heal(folder, digest) else "same"
        self._candidates.add(digest)
        self._store.commit(folder, digest)
        return "new"

    def hold(self, digest: str) -> None:
        """Protect `digest` from collection until `release`."""
        self._held[digest] += 1

    def release(self, digest: str) -> None:
        """End one `hold` of `digest`."""
        self._held[digest] -= 1

    def add_candidates(self, digests: Collection[str]) -> None:
        """Add digests that left a name's history to the candidates."""
        self._candidates.update(digests)

    def collect(self, in_use: Collection[str]) -> list[str]:
        """Delete all candidates that are unreferenced, not held and not `in_use`; returns their digests, sorted.
        Raises `NoSpace`."""
        self._held = +self._held  # drops digests whose count is 0
        self._candidates = {digest for digest in self._candidates if not self._is_named(digest)}
        garbage = sorted(self._candidates.difference(in_use, self._held))
        if garbage:
            with transaction(self._db):
                for table in ("versions", "checks"):
                    self._db.executemany(f"DELETE FROM {table} WHERE digest = ?", [(digest,) for digest in garbage])
        for digest in garbage:
            self._store.delete(digest)
        self._candidates.difference_update(garbage)
        return garbage

    def _is_named(self, digest: str) -> bool:
        return self._db.execute("SELECT 1 FROM history WHERE digest = ?", (digest,)).fetchone() is not None

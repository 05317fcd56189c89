"""Which adapters there are: names that point to immutable versions, durable in SQLite, looked up without a lock."""

import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from adapters.errors import AdapterConflict, AdapterNotFound, InvalidName
from adapters.records import AdapterRecord, AdapterVersion, Entry, HistoryEntry, Inspected, PendingAdapter
from adapters.registry.aliases import Alias, delete_alias, read_aliases, write_alias
from adapters.registry.db import connect, point, read_entries, read_pending, transaction, was_set_aside
from adapters.registry.folder_lock import RegistryLocked, lock
from adapters.registry.gc import Garbage
from adapters.registry.index import Catalogue
from adapters.registry.store import AdapterStore

__all__ = ["AdapterRecord", "AdapterRegistry", "AdapterVersion", "HistoryEntry", "RegistryLocked", "check_name"]

RETAINED_VERSIONS = 5
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise `InvalidName` unless `name` may name an adapter."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidName(
            "An adapter's name has 1 to 64 characters of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, "
            "and has no '..'."
        )


class AdapterRegistry:
    """All adapters of one data folder, of which one process is the owner.

    Methods may be called from any thread. Readers see the state of the last finished write and wait for nobody. What a
    change costs does not depend on how many adapters there are. `damaged` says by name why an adapter is not served,
    `pending` has by name what is still to be fetched or could not be, and `aliases` stand for several adapters: dicts
    that writers replace.
    """

    store: AdapterStore
    damaged: dict[str, str]
    pending: dict[str, PendingAdapter]
    aliases: dict[str, Alias]

    def __init__(self, data_dir: Path, reserved: Collection[str] = ()):
        """Open `data_dir`, creating it if needed; `reserved` names cannot be taken by adapters.

        Raises `RegistryLocked` when another process has it open.
        """
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._reserved = frozenset(reserved)
        self._writing = threading.Lock()
        with ExitStack() as undo:  # gives back what was taken when a later step fails
            undo.callback(os.close, lock(data_dir / "lock"))
            self.store = AdapterStore(data_dir / "store")
            self.store.sweep()
            self._db = undo.enter_context(closing(connect(data_dir, self.store)))
            self._garbage = Garbage(self._db, self.store, keep_orphans=was_set_aside(data_dir))
            self.collect_garbage()
            entries = read_entries(self._db, self.store)
            self._catalogue = Catalogue(entries)
            self.damaged = {name: entry.damage for name, entry in entries.items() if entry.damage}
            self.aliases = read_aliases(self._db)
            self.pending = read_pending(self._db)
            self._held = undo.pop_all()

    def close(self) -> None:
        """Close the database and give the data folder back. Only `close` may follow."""
        with self._writing:
            self._held.close()

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, name: str) -> bool:
        return self._catalogue.get(name) is not None

    def resolve(self, model: str) -> AdapterRecord:
        """What `name` points to now, or the stored version meant by `name@<12 or more hex digits>`.

        Raises `AdapterNotFound`, with one message for everything that cannot be served.
        """
        name, at, version = model.partition("@")
        entry = self._catalogue.get(name)
        if entry is not None and at:
            record = entry.matching(version)
            if record is not None:
                return record
        elif entry is not None and entry.damage is None:
            return entry.record
        raise _not_found(model)

    def record(self, name: str) -> AdapterRecord:
        """The record of `name`, damaged or not. Raises `AdapterNotFound`."""
        return self._entry(name).record

    def records(self, *, limit: int = 100, after: str = "") -> tuple[list[AdapterRecord], bool]:
        """Up to `limit` records in the order of names past `after`, damaged ones included; and whether more follow."""
        found = list(islice(self.walk(after), limit + 1))
        return found[:limit], len(found) > limit

    def walk(self, after: str = "") -> Iterator[AdapterRecord]:
        """All records in the order of names past `after`, damaged ones included."""
        return self._catalogue.walk(after)

    def history(self, name: str) -> list[HistoryEntry]:
        """The retained versions of `name`, newest first. Raises `AdapterNotFound`."""
        return list(self._entry(name).history)

    def names_of(self, digest: str) -> list[str]:
        """The names that point to `digest` now, sorted."""
        return list(self._catalogue.names_of(digest))

    def digests(self) -> set[str]:
        """Of all versions that a name points to now."""
        return self._catalogue.digests()

    def publish(
        self,
        name: str,
        inspected: Inspected,
        folder: Path,
        *,
        source: str = "upload",
        replace: bool = False,
        pinned: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Store the staged `folder` and point `name` at it, both or neither, also across a crash.

        Returns the record, and False when `name` pointed to this content already. `pinned` pins; it never unpins.
        Nothing is pending under `name` any more.
        Raises `InvalidName`, `AdapterConflict` (reserved, an alias, or taken and not `replace`) or `NoSpace`.
        """
        with self._writing:
            self._check_free(name)
            known = self._catalogue.get(name)
            same = known is not None and known.record.version.digest == inspected.digest
            if known is not None and not same and not replace:
                raise AdapterConflict(f"The adapter '{name}' exists; publish with replace to give it a new version.")
            self._garbage.admit(folder, inspected.digest)
            with transaction(self._db):
                if known is None or known.damage or not same:
                    point(self._db, name, _as_version(inspected), source, pinned, RETAINED_VERSIONS)
                self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
            self._refresh(name)
            self.pending = {key: value for key, value in self.pending.items() if key != name}
            return self._entry(name).record, not same

    def hold(self, digest: str, folder: Path) -> None:
        """Store the staged `folder` before any name points at it, until `let_go`. Raises `NoSpace`."""
        with self._writing:
            self._garbage.admit(folder, digest)
            self._garbage.hold(digest)

    def let_go(self, digest: str) -> None:
        """End a `hold`; the next `collect_garbage` takes the files unless a name points at them by then."""
        with self._writing:
            self._garbage.let_go(digest)

    def rollback(self, name: str, version: str | None) -> AdapterRecord:
        """Point `name` at an earlier version: the one before the current, or the one that begins with `version`.

        Raises `AdapterNotFound` (no such name or version) or `AdapterConflict` (nothing before the current one).
        """
        with self._writing:
            entry = self._entry(name)
            target = entry.previous() if version is None else entry.matching(version)
            if target is None and version is None:
                raise AdapterConflict(f"The adapter '{name}' has no earlier version.")
            if target is None:
                raise _not_found(f"{name}@{version}")
            with transaction(self._db):
                values = (target.version.digest, name)
                self._db.execute("UPDATE history SET current = (digest = ?) WHERE name = ?", values)
            self._refresh(name)
            return self._entry(name).record

    def set_pinned(self, name: str, pinned: bool) -> AdapterRecord:
        """Raises `AdapterNotFound`."""
        with self._writing:
            self._entry(name)
            with transaction(self._db):
                self._db.execute("UPDATE names SET pinned = ? WHERE name = ?", (pinned, name))
            self._refresh(name)
            return self._entry(name).record

    def retire(self, name: str) -> AdapterRecord:
        """Forget `name` and its history; its last record is returned, its files wait for `collect_garbage`.

        Raises `AdapterNotFound`, and `AdapterConflict` for a member of an alias: what it was given would go to others.
        """
        with self._writing:
            record = self._entry(name).record
            if any(name in alias.weights for alias in self.aliases.values()):
                raise AdapterConflict(f"An alias sends requests to the adapter '{name}'; change its split first.")
            with transaction(self._db):
                self._db.execute("DELETE FROM names WHERE name = ?", (name,))
                self._db.execute("DELETE FROM history WHERE name = ?", (name,))
            self._refresh(name)
            return record

    def remember(self, pending: PendingAdapter) -> None:
        """Have it among `pending`, also after a restart, in place of what was pending under its name.

        Raises `InvalidName`, `AdapterConflict` (reserved or an alias) or `NoSpace`.
        """
        with self._writing:
            self._check_free(pending.name)
            with transaction(self._db):
                values = ":name, :source, :replacing, :pinned, :created, :error"
                self._db.execute(f"INSERT OR REPLACE INTO pending VALUES ({values})", asdict(pending))
            self.pending = {**self.pending, pending.name: pending}

    def forget(self, name: str) -> None:
        """Take `name` out of `pending`; nothing happens when it is not there."""
        with self._writing:
            with transaction(self._db):
                self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
            self.pending = {key: value for key, value in self.pending.items() if key != name}

    def split(self, name: str, weights: Mapping[str, int]) -> Alias:
        """Have the alias `name` stand for the adapters in `weights`, in place of what it stood for.

        Raises `InvalidName`, `AdapterConflict` (the name is the base model's or an adapter's), `AdapterNotFound` (a
        member) or `NoSpace`.
        """
        with self._writing:
            known = self.aliases.get(name)
            if known is None:
                self._check_free(name)
            if name in self or name in self.pending:
                raise AdapterConflict(f"The name '{name}' is an adapter's.")
            for member in weights:
                self._entry(member)
            alias = Alias(name, dict(weights), known.created if known else int(time.time()))
            with transaction(self._db):
                write_alias(self._db, alias)
            self.aliases = {**self.aliases, name: alias}
            return alias

    def unsplit(self, name: str) -> None:
        """Forget an alias. Raises `AdapterNotFound`."""
        with self._writing:
            if name not in self.aliases:
                raise _not_found(name)
            with transaction(self._db):
                delete_alias(self._db, name)
            self.aliases = {key: value for key, value in self.aliases.items() if key != name}

    def collect_garbage(self, in_use: Collection[str] = ()) -> list[str]:
        """Delete the stored versions that no name's history holds and that are not `in_use`; returns their digests."""
        with self._writing:
            return self._garbage.collect(in_use)

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self._reserved:
            raise AdapterConflict(f"The name '{name}' is the base model's.")
        if name in self.aliases:
            raise AdapterConflict(f"The name '{name}' is an alias; remove its split first.")

    def _entry(self, name: str) -> Entry:
        entry = self._catalogue.get(name)
        if entry is None:
            raise _not_found(name)
        return entry

    def _refresh(self, name: str) -> None:
        """Read `name` again."""
        fresh = read_entries(self._db, self.store, name).get(name)
        old = self._catalogue.put(name, fresh)
        if old is not None:
            self._garbage.left(old.digests() - (fresh.digests() if fresh else set()))
        self.damaged.pop(name, None)
        if fresh is not None and fresh.damage:
            self.damaged[name] = fresh.damage


def _not_found(model: str) -> AdapterNotFound:
    return AdapterNotFound(f"The model {model[:200]!r} does not exist.")


def _as_version(inspected: Inspected) -> AdapterVersion:
    created = int(time.time())
    report = json.dumps(inspected.report)
    return AdapterVersion(inspected.digest, inspected.rank, inspected.target_modules, inspected.nbytes, created, report)

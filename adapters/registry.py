"""Which adapters there are: names that point to immutable versions, durable in SQLite, looked up without a lock."""

import fcntl
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, InvalidName
from adapters.registry_db import (
    AdapterRecord,
    AdapterVersion,
    Entry,
    HistoryEntry,
    PendingAdapter,
    connect,
    point,
    read_entries,
    read_pending,
    transaction,
    was_set_aside,
)
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from adapters.validation import Inspected  # needs torch; the registry does not

__all__ = ["AdapterRecord", "AdapterRegistry", "AdapterVersion", "HistoryEntry", "RegistryLocked", "check_name"]

RETAINED_VERSIONS = 5
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")


class RegistryLocked(AdapterError):
    """Another server uses the data folder; the message names its process."""

    code = "registry_locked"


def check_name(name: str) -> None:
    """Raise `InvalidName` unless `name` may name an adapter."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidName(
            "An adapter's name has 1 to 64 characters of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, "
            "and has no '..'."
        )


class AdapterRegistry:
    """All adapters of one data folder, of which one process is the owner.

    Methods may be called from any thread. Readers see the state of the last finished write: `resolve` and the other
    lookups read a dict that writers replace and never change. `damaged` says by name why an adapter is not served, and
    `pending` has by name what is still to be fetched or could not be.
    """

    store: AdapterStore
    damaged: dict[str, str]
    pending: dict[str, PendingAdapter]

    def __init__(self, data_dir: Path, reserved: Collection[str] = ()):
        """Open `data_dir`, creating it if needed; `reserved` names cannot be taken by adapters.

        Raises `RegistryLocked` when another process has it open.
        """
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._reserved = frozenset(reserved)
        self._writing = threading.Lock()
        self._held_digests: Counter[str] = Counter()
        with ExitStack() as undo:  # gives back what was taken when a later step fails
            undo.callback(os.close, _lock(data_dir / "lock"))
            self.store = AdapterStore(data_dir / "store")
            self.store.sweep()
            self._db = undo.enter_context(closing(connect(data_dir, self.store)))
            self._keeps_orphans = was_set_aside(data_dir)
            self.collect_garbage()
            self._entries = read_entries(self._db, self.store)
            self.damaged = {name: entry.damage for name, entry in self._entries.items() if entry.damage}
            self.pending = read_pending(self._db)
            self._held = undo.pop_all()

    def close(self) -> None:
        """Close the database and give the data folder back. Only `close` may follow."""
        with self._writing:
            self._held.close()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def resolve(self, model: str) -> AdapterRecord:
        """What `name` points to now, or the stored version meant by `name@<12 or more hex digits>`.

        Raises `AdapterNotFound`, with one message for everything that cannot be served.
        """
        name, at, version = model.partition("@")
        entry = self._entries.get(name)
        if entry is not None and at:
            digest = _one_match(entry.versions, version)
            if digest is not None:
                return entry.versions[digest]
        elif entry is not None and entry.damage is None:
            return entry.record
        raise _not_found(model)

    def records(self, *, limit: int = 100, after: str = "") -> tuple[list[AdapterRecord], bool]:
        """Up to `limit` records in the order of names past `after`, damaged ones included; and whether more follow."""
        entries = self._entries
        names = sorted(name for name in entries if name > after)
        return [entries[name].record for name in names[:limit]], len(names) > limit

    def history(self, name: str) -> list[HistoryEntry]:
        """The retained versions of `name`, newest first. Raises `AdapterNotFound`."""
        return list(self._entry(name).history)

    def names_of(self, digest: str) -> list[str]:
        """The names that point to `digest` now, sorted."""
        return sorted(name for name, entry in self._entries.items() if entry.record.version.digest == digest)

    def publish(
        self,
        name: str,
        inspected: "Inspected",
        folder: Path,
        *,
        source: str = "upload",
        replace: bool = False,
        pinned: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Store the staged `folder` and point `name` at it, both or neither, also across a crash.

        Returns the record, and False when `name` pointed to this content already. `pinned` pins; it never unpins.
        Nothing is pending under `name` any more.
        Raises `InvalidName`, `AdapterConflict` (reserved, or taken and not `replace`) or `NoSpace`.
        """
        self._check_free(name)
        with self._writing:
            known = self._entries.get(name)
            same = known is not None and known.record.version.digest == inspected.digest
            if known is not None and not same and not replace:
                raise AdapterConflict(f"The adapter '{name}' exists; publish with replace to give it a new version.")
            self.store.admit(folder, inspected.digest)
            with transaction(self._db):
                if known is None or known.damage or not same:
                    point(self._db, name, _as_version(inspected), source, pinned, RETAINED_VERSIONS)
                self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
            self._refresh(name)
            self.pending = read_pending(self._db)
            return self._entry(name).record, not same

    def hold(self, digest: str, folder: Path) -> None:
        """Store the staged `folder` before any name points at it, until `let_go`. Raises `NoSpace`."""
        with self._writing:
            self.store.admit(folder, digest)
            self._held_digests[digest] += 1

    def let_go(self, digest: str) -> None:
        """End a `hold`; the next `collect_garbage` takes the files unless a name points at them by then."""
        with self._writing:
            self._held_digests[digest] -= 1

    def rollback(self, name: str, version: str | None) -> AdapterRecord:
        """Point `name` at an earlier version: the one before the current, or the one that begins with `version`.

        Raises `AdapterNotFound` (no such name or version) or `AdapterConflict` (nothing before the current one).
        """
        with self._writing:
            entry = self._entry(name)
            digest = _previous(entry) if version is None else _one_match(entry.versions, version)
            if digest is None and version is None:
                raise AdapterConflict(f"The adapter '{name}' has no earlier version.")
            if digest is None:
                raise _not_found(f"{name}@{version}")
            with transaction(self._db):
                self._db.execute("UPDATE history SET current = (digest = ?) WHERE name = ?", (digest, name))
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

        Raises `AdapterNotFound`.
        """
        with self._writing:
            record = self._entry(name).record
            with transaction(self._db):
                self._db.execute("DELETE FROM names WHERE name = ?", (name,))
                self._db.execute("DELETE FROM history WHERE name = ?", (name,))
            self._refresh(name)
            return record

    def remember(self, pending: PendingAdapter) -> None:
        """Have it among `pending`, also after a restart, in place of what was pending under its name.

        Raises `InvalidName`, `AdapterConflict` (reserved) or `NoSpace`.
        """
        self._check_free(pending.name)
        with self._writing:
            with transaction(self._db):
                values = ":name, :source, :replacing, :pinned, :created, :error"
                self._db.execute(f"INSERT OR REPLACE INTO pending VALUES ({values})", asdict(pending))
            self.pending = read_pending(self._db)

    def forget(self, name: str) -> None:
        """Take `name` out of `pending`; nothing happens when it is not there."""
        with self._writing:
            with transaction(self._db):
                self._db.execute("DELETE FROM pending WHERE name = ?", (name,))
            self.pending = read_pending(self._db)

    def collect_garbage(self, in_use: Collection[str] = ()) -> list[str]:
        """Delete the stored versions that no name's history holds and that are not `in_use`; returns their digests."""
        with self._writing:
            held = {row["digest"] for row in self._db.execute("SELECT digest FROM history")}.union(in_use)
            held |= {digest for digest, holders in self._held_digests.items() if holders}
            known = {row["digest"] for row in self._db.execute("SELECT digest FROM versions")}
            stored = set(self.store.digests())
            # Files that no row knows are left by a crash, or named by a database that was set aside.
            garbage = sorted((known if self._keeps_orphans else known | stored) - held)
            with transaction(self._db):
                self._db.executemany("DELETE FROM versions WHERE digest = ?", [(digest,) for digest in garbage])
            for digest in stored.intersection(garbage):
                self.store.delete(digest)
            return garbage

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self._reserved:
            raise AdapterConflict(f"The name '{name}' is the base model's.")

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise _not_found(name)
        return entry

    def _refresh(self, name: str) -> None:
        """Read `name` again and replace the dicts that readers hold."""
        fresh = read_entries(self._db, self.store, name)
        self._entries = {key: entry for key, entry in self._entries.items() if key != name} | fresh
        damage = {key: entry.damage for key, entry in fresh.items() if entry.damage}
        self.damaged = {key: reason for key, reason in self.damaged.items() if key != name} | damage


def _not_found(model: str) -> AdapterNotFound:
    return AdapterNotFound(f"The model {model[:200]!r} does not exist.")


def _one_match(versions: Collection[str], version: str) -> str | None:
    """The digest that `version` abbreviates, if it is exactly one."""
    match = _VERSION.fullmatch(version)
    found = [digest for digest in versions if match and digest.startswith(match[1])]
    return found[0] if len(found) == 1 else None


def _previous(entry: Entry) -> str | None:
    """The newest stored version that was published before the current one."""
    from_current = dropwhile(lambda version: not version.current, entry.history)
    return next((v.digest for v in from_current if not v.current and v.digest in entry.versions), None)


def _as_version(inspected: "Inspected") -> AdapterVersion:
    created = int(time.time())
    return AdapterVersion(
        inspected.digest, inspected.rank, inspected.target_modules, inspected.nbytes, created, inspected.report
    )


def _lock(path: Path) -> int:
    """Take the exclusive lock on `path`, which the kernel releases when this process ends; returns its handle."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise RegistryLocked(f"The data folder is in use by process {holder}.") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, b"%d\n" % os.getpid(), 0)
    return handle

"""Registry of adapters: names that point to immutable versions, durable in SQLite, looked up without a lock."""

import json
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from adapters.errors import AdapterConflict
from adapters.names import check_name
from adapters.records import AdapterRecord, AdapterVersion, HistoryEntry, Inspected, PendingAdapter
from adapters.registry.aliases import BASE_MEMBER, Alias, delete_alias, read_aliases, write_alias
from adapters.registry.db import (
    connect,
    delete_name,
    delete_pending,
    mark_rebuilt,
    names_with,
    point,
    read_checks,
    read_damage,
    read_entries,
    read_pending,
    set_aside_files,
    stored_bytes,
    transaction,
    update_report,
    write_check,
    write_pending,
    write_settings,
)
from adapters.registry.folder_lock import RegistryLocked, lock
from adapters.registry.gc import GarbageCollector, Stored
from adapters.registry.index import RegistryIndex
from adapters.registry.journal import Journal, Line, alias_line, name_line, no_alias_line
from adapters.registry.lookups import Lookups, not_found
from adapters.registry.packed_files import PACKED_FOLDER, remove_packed
from adapters.registry.rebuild import Restored, restore
from adapters.registry.spare_space import SpareSpace
from adapters.registry.store import AdapterStore, Signature

__all__ = [
    "AdapterRecord",
    "AdapterRegistry",
    "AdapterVersion",
    "HistoryEntry",
    "RegistryLocked",
    "Restored",
    "check_name",
]

log = logging.getLogger(__name__)

RETAINED_VERSIONS = 5


class AdapterRegistry(Lookups):
    """All adapters of one data folder, which only one process may open.

    Methods may be called from any thread. Readers see the state of the last finished write and never wait. The cost of
    a change does not depend on the number of adapters. `damaged` has by name the reason why an adapter is not served,
    `pending` has by name the adapters still to be fetched or that failed to be, and `aliases` distribute requests over
    several adapters; writers replace `pending` and `aliases` as a whole. `set_aside` has the damaged databases that
    were put aside and that `rebuild` has not dealt with.
    """

    store: AdapterStore
    damaged: dict[str, str]
    pending: dict[str, PendingAdapter]
    aliases: dict[str, Alias]
    set_aside: list[Path]

    def __init__(self, data_dir: Path, reserved: Collection[str] = ()):
        """Open `data_dir`, creating it if needed; `reserved` names cannot be taken by adapters.

        Raises `RegistryLocked` when another process has it open.
        """
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._reserved = frozenset(reserved)
        self._data_dir = data_dir
        self._writing = threading.Lock()
        self._is_closed = False
        self._packed = data_dir / PACKED_FOLDER
        with ExitStack() as undo:  # releases the lock and the database when a later step fails
            undo.callback(os.close, lock(data_dir / "lock"))
            self.store = AdapterStore(data_dir / "store")
            self.store.sweep()
            self._db = undo.enter_context(closing(connect(data_dir, self.store)))
            self.set_aside = set_aside_files(data_dir)
            self._collector = GarbageCollector(self._db, self.store, keep_orphans=bool(self.set_aside))
            self._spare = SpareSpace(data_dir)
            self.collect_garbage()
            entries = read_entries(self._db, self.store)
            self._index = RegistryIndex(entries)
            self.damaged = {name: entry.damage for name, entry in entries.items() if entry.damage}
            self.aliases = read_aliases(self._db)
            self.pending = read_pending(self._db)
            self._journal = Journal(data_dir)
            self._write_journal()
            self._held = undo.pop_all()

    def close(self) -> None:
        """Close the database and release the data folder's lock. Only `collect_garbage` may be called afterwards."""
        with self._writing:
            self._is_closed = True
            self._held.close()

    def stored_bytes(self) -> int:
        """Return the bytes of the weights of all stored versions."""
        with self._writing:
            return stored_bytes(self._db)

    def publish(
        self,
        name: str,
        inspected: Inspected,
        folder: Path,
        *,
        source: str = "upload",
        replace: bool = False,
        pinned: bool = False,
        settings: str | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Store the staged `folder` and point `name` at it: both or neither, also across a crash. A version that is
        held or stored already needs no files in `folder`.

        Returns the record, and False when `name` pointed to this content already. `pinned` pins the adapter; it never
        unpins. `settings` replace those of the name unless they are None. A pending adapter of this name is removed
        from `pending`. Raises `InvalidName`, `AdapterConflict` (reserved, an alias, or taken and not `replace`) or
        `NoSpace`.
        """
        with self._writing:
            self._check_free(name)
            known = self._index.get(name)
            same = known is not None and known.record.version.digest == inspected.digest
            if known is not None and not same and not replace:
                raise AdapterConflict(f"The adapter '{name}' exists; publish with replace to give it a new version.")
            stored = self._commit(folder, inspected.digest)
            with transaction(self._db):
                write_check(self._db, inspected.digest, int(time.time()), None)  # its bytes were just compared
                if known is None or known.damage or not same:
                    point(self._db, name, _as_version(inspected), source, pinned, RETAINED_VERSIONS)
                elif known.record.version.report != inspected.report:
                    update_report(self._db, inspected.digest, json.dumps(inspected.report))
                if settings is not None:
                    write_settings(self._db, name, settings)
                delete_pending(self._db, name)
            self._note(name_line(self._db, name))
            self._refresh(name)
            if stored != "same" or self._is_damaged(inspected.digest):  # the version's row is whole now as well
                self._refresh_sharing(inspected.digest)
            self.pending = {key: value for key, value in self.pending.items() if key != name}
            return self._entry(name).record, not same

    def hold(self, digest: str, folder: Path) -> bool:
        """Store the staged `folder` before any name points at it, and keep it until `release`. Damaged files of the
        same version are replaced, for all names. Returns False if the stored files are not those of `folder`, but
        earlier ones. Raises `NoSpace`."""
        with self._writing:
            stored = self._commit(folder, digest)
            self._collector.hold(digest)
            return stored != "same"

    def release(self, digest: str) -> None:
        """End a `hold`; the next `collect_garbage` deletes the files unless a name points at them by then."""
        with self._writing:
            self._collector.release(digest)

    def unchecked(self, before: int) -> list[str]:
        """Return the versions in use by a name whose stored files were not checked since `before`, in Unix seconds,
        oldest check first."""
        with self._writing:
            return read_checks(self._db, before)

    def note_check(self, digest: str, damage: str | None, signature: Signature) -> bool:
        """Record that the stored files of a version were compared with its digest, and found damaged unless `damage` is
        None. A damaged version is not served under any name until its files are replaced.

        Returns False, and changes nothing, if the files were replaced or deleted meanwhile: `signature` is the store's
        from before the comparison.
        """
        with self._writing:
            names = names_with(self._db, digest)
            if not names or self.store.signature(digest) != signature:
                return False
            with transaction(self._db):
                write_check(self._db, digest, int(time.time()), damage)
            for name in names:
                self._refresh(name)
            return True

    def rollback(self, name: str, version: str | None) -> AdapterRecord:
        """Point `name` at an earlier version: the one before the current version, or the one whose digest starts with
        `version`.

        Raises `AdapterNotFound` (no such name or version) or `AdapterConflict` (no version before the current one).
        """
        with self._writing:
            entry = self._entry(name)
            target = entry.previous() if version is None else entry.matching(version)
            if target is None and version is None:
                raise AdapterConflict(f"The adapter '{name}' has no earlier version.")
            if target is None:
                raise not_found(f"{name}@{version}")
            with transaction(self._db):
                values = (target.version.digest, name)
                self._db.execute("UPDATE history SET current = (digest = ?) WHERE name = ?", values)
            self._note(name_line(self._db, name))
            self._refresh(name)
            return self._entry(name).record

    def set_pinned(self, name: str, pinned: bool) -> AdapterRecord:
        """Pin or unpin the adapter and return its record. Raises `AdapterNotFound`."""
        with self._writing:
            self._entry(name)
            with transaction(self._db):
                self._db.execute("UPDATE names SET pinned = ? WHERE name = ?", (pinned, name))
            self._note(name_line(self._db, name))
            self._refresh(name)
            return self._entry(name).record

    def set_settings(self, name: str, settings: str) -> AdapterRecord:
        """Replace the settings of a name, "" for none, and return its record. Raises `AdapterNotFound` or `NoSpace`."""
        with self._writing:
            self._entry(name)
            with transaction(self._db):
                write_settings(self._db, name, settings)
            self._note(name_line(self._db, name))
            self._refresh(name)
            return self._entry(name).record

    def retire(self, name: str) -> AdapterRecord:
        """Remove `name` and its history, and return its last record. The files stay until `collect_garbage`.

        Raises `AdapterNotFound`, and `AdapterConflict` for a member of an alias, whose requests would go to other
        members.
        """
        with self._writing:
            record = self._entry(name).record
            if any(name in alias.weights for alias in self.aliases.values()):
                raise AdapterConflict(f"An alias sends requests to the adapter '{name}'; change its split first.")
            self._spare.spend_on(lambda: delete_name(self._db, name))
            self._note(name_line(self._db, name))
            self._refresh(name)
            return record

    def remember(self, pending: PendingAdapter) -> None:
        """Add to `pending`, durably, replacing any pending adapter of the same name.

        Raises `InvalidName`, `AdapterConflict` (reserved or an alias) or `NoSpace`.
        """
        with self._writing:
            self._check_free(pending.name)
            write_pending(self._db, pending)
            self.pending = {**self.pending, pending.name: pending}

    def forget(self, name: str) -> None:
        """Remove `name` from `pending`, if it is there."""
        with self._writing:

            def delete() -> None:
                with transaction(self._db):
                    delete_pending(self._db, name)

            self._spare.spend_on(delete)
            self.pending = {key: value for key, value in self.pending.items() if key != name}

    def split(self, name: str, weights: Mapping[str, float]) -> Alias:
        """Create or replace the alias `name` for the adapters in `weights`.

        Raises `InvalidName`, `AdapterConflict` (the name is the base model's or an adapter's), `AdapterNotFound` (a
        member) or `NoSpace`.
        """
        with self._writing:
            known = self.aliases.get(name)
            if known is None:
                self._check_free(name)
            if name in self or name in self.pending:
                raise AdapterConflict(f"The name '{name}' is an adapter's.")
            for member in weights.keys() - {BASE_MEMBER}:
                self._entry(member)
            alias = Alias(name, dict(weights), known.created if known else int(time.time()))
            with transaction(self._db):
                write_alias(self._db, alias)
            self.aliases = {**self.aliases, name: alias}
            self._note(alias_line(alias))
            return alias

    def unsplit(self, name: str) -> None:
        """Remove an alias. Raises `AdapterNotFound`."""
        with self._writing:
            if name not in self.aliases:
                raise not_found(name)

            def delete() -> None:
                with transaction(self._db):
                    delete_alias(self._db, name)

            self._spare.spend_on(delete)
            self.aliases = {key: value for key, value in self.aliases.items() if key != name}
            self._note(no_alias_line(name))

    def collect_garbage(self, in_use: Collection[str] = ()) -> list[str]:
        """Delete the stored versions that are in no name's history and not `in_use`, unless the registry is closed;
        returns their digests. Raises `NoSpace`."""
        with self._writing:
            if self._is_closed:
                return []
            deleted = self._spare.spend_on(lambda: self._collector.collect(in_use))
            for digest in deleted:
                remove_packed(self._packed, digest)
            self._spare.fill()
            return deleted

    def _commit(self, folder: Path, digest: str) -> Stored:
        """Store the staged `folder`, and end the damage of its version."""
        stored = self._collector.commit(folder, digest)
        if stored == "healed":
            log.warning("the damaged stored files of version %s were replaced by those of an upload", digest[:12])
        was_damaged = self._is_damaged(digest)
        if stored == "healed" or was_damaged:
            with transaction(self._db):
                write_check(self._db, digest, int(time.time()), None)
        if stored != "same" or was_damaged:
            self._refresh_sharing(digest)
        return stored

    def _is_damaged(self, digest: str) -> bool:
        named = any(self._entry(name).record.version.digest == digest for name in self.damaged if name in self)
        return named or read_damage(self._db, digest) is not None

    def _refresh_sharing(self, digest: str) -> None:
        for name in names_with(self._db, digest):
            self._refresh(name)

    def rebuild(self) -> list[Restored]:
        """Add the names of the journal that the registry has lost; returns what became of each name and stored version.
        The damaged databases are renamed once every stored version has a name again."""
        with self._writing:
            found = restore(self._db, self.store, self._journal.read(), self._reserved)
            for name in (one.name for one in found if one.outcome in ("restored", "damaged")):
                if name is not None:
                    self._refresh(name)
            self.aliases = read_aliases(self._db)
            if not any(one.outcome == "unknown" for one in found):
                mark_rebuilt(self._data_dir)
                self.set_aside = []
                self._write_journal()
            return found

    def _write_journal(self) -> None:
        """Write the journal anew, unless it may have names that the database has lost."""
        if not self.set_aside:
            self._journal.write(self._db)

    def _note(self, line: Line) -> None:
        if self._journal.append(line):
            self._write_journal()

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self._reserved:
            raise AdapterConflict(f"The name '{name}' is the base model's.")
        if name in self.aliases:
            raise AdapterConflict(f"The name '{name}' is an alias; remove its split first.")

    def _refresh(self, name: str) -> None:
        """Update the entry of `name` in memory from the database."""
        fresh = read_entries(self._db, self.store, name).get(name)
        old = self._index.put(name, fresh)
        if old is not None:
            self._collector.add_candidates(old.digests() - (fresh.digests() if fresh else set()))
        self.damaged.pop(name, None)
        if fresh is not None and fresh.damage:
            self.damaged[name] = fresh.damage


def _as_version(inspected: Inspected) -> AdapterVersion:
    created = int(time.time())
    report = json.dumps(inspected.report)
    return AdapterVersion(inspected.digest, inspected.rank, inspected.target_modules, inspected.nbytes, created, report)

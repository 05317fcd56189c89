"""Rebuilding of a registry whose database was lost, from the store's folders and the journal of names."""

import sqlite3
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterInvalid
from adapters.peft.digest import digest_of
from adapters.registry.aliases import BASE_MEMBER, Alias, read_aliases, write_alias
from adapters.registry.db import transaction, write_check, write_settings
from adapters.registry.journal import Line, Noted, stored_versions
from adapters.registry.store import AdapterStore

DAMAGED = "its stored files are damaged"


@dataclass(frozen=True, slots=True)
class Restored:
    """Result for one name, or for a stored version that no name is known for (`name` is None). `kept` names were in
    the registry already; `lost` ones have no stored version."""

    name: str | None
    digest: str
    outcome: Literal["restored", "damaged", "kept", "lost", "unknown", "alias"]
    versions: int = 0


def restore(db: sqlite3.Connection, store: AdapterStore, noted: Noted, reserved: Collection[str]) -> list[Restored]:
    """Write the names of the journal that the database does not have. A name points to the version that it last pointed
    to, or to the newest one that is stored. Nothing is guessed: a version without a line in the journal gets no name,
    because its row could not be complete without the base model."""
    stored = [digest for digest in store.digests() if digest in store]
    known = {row["name"] for row in db.execute("SELECT name FROM names")} | read_aliases(db).keys()
    damaged = _damaged(store, noted, stored, known)
    found: list[Restored] = []
    with transaction(db):
        for name, line in sorted(noted.names.items()):
            versions = stored_versions(line, stored)
            if name in known or name in reserved or not line["versions"]:
                continue
            if not versions:
                found.append(Restored(name, line["versions"][-1]["digest"], "lost"))
                continue
            digest = _write_name(db, line, versions)
            found.append(Restored(name, digest, "damaged" if digest in damaged else "restored", len(versions)))
        for digest in stored:
            if digest in damaged:
                write_check(db, digest, int(time.time()), DAMAGED)
        found += _restore_aliases(db, noted, known)
    named = {row["digest"] for row in db.execute("SELECT digest FROM history")}
    kept = db.execute("SELECT name, digest FROM history WHERE current ORDER BY name").fetchall()
    found += [Restored(row["name"], row["digest"], "kept") for row in kept if row["name"] in known]
    return found + [Restored(None, digest, "unknown") for digest in stored if digest not in named]


def _damaged(store: AdapterStore, noted: Noted, stored: Collection[str], known: Collection[str]) -> set[str]:
    """Return the versions to be restored whose files do not have their digest."""
    lines = [line for name, line in noted.names.items() if name not in known]
    digests = {version["digest"] for line in lines for version in stored_versions(line, stored)}
    return {digest for digest in digests if not _is_sound(store, digest)}


def _is_sound(store: AdapterStore, digest: str) -> bool:
    try:
        return digest_of(store.path(digest)) == digest
    except (AdapterInvalid, OSError):
        return False


def _write_name(db: sqlite3.Connection, line: Line, versions: list[Line]) -> str:
    """Insert a name with its history; returns the version that it points to."""
    db.execute("INSERT INTO names VALUES (?, ?, ?)", (line["name"], line["pinned"], line["created"]))
    write_settings(db, line["name"], line.get("settings") or "")  # lines of earlier versions have none
    current = next((v["digest"] for v in versions if v["current"]), versions[-1]["digest"])
    for v in versions:
        row = (v["digest"], v["rank"], v["target_modules"], v["nbytes"], v["created"], v["report"])
        db.execute("INSERT OR IGNORE INTO versions VALUES (?, ?, ?, ?, ?, ?)", row)
        db.execute(
            "INSERT INTO history (name, digest, source, created, current) VALUES (?, ?, ?, ?, ?)",
            (line["name"], v["digest"], v["source"], v["published"], v["digest"] == current),
        )
    return str(current)


def _restore_aliases(db: sqlite3.Connection, noted: Noted, known: Collection[str]) -> list[Restored]:
    """Restore the aliases whose members are all there."""
    names = {row["name"] for row in db.execute("SELECT name FROM names")}
    found = []
    for name, line in sorted(noted.aliases.items()):
        weights: dict[str, float] = line["weights"]
        if weights and name not in known and name not in names:
            complete = weights.keys() <= names | {BASE_MEMBER}
            if complete:
                write_alias(db, Alias(name, weights, line["created"]))
            found.append(Restored(name, "", "alias" if complete else "lost"))
    return found

"""Journal of names and aliases beside the database: what a lost database takes with it, and the store does not say.

Each line has the state of one name or alias after a change, behind a checksum; the last valid line of a name counts.
The journal is written anew from the database at every start, so that it has no more lines than names then.
"""

import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from adapters.registry.aliases import Alias, read_aliases

log = logging.getLogger(__name__)

JOURNAL = "names.journal"
_GROWTH_BYTES = 4 << 20  # the journal may grow by this beyond twice its size before it is written anew
_QUERY = """
SELECT names.name, names.pinned, names.created AS named, history.digest, history.source, history.created AS published,
       history.current, versions.rank, versions.target_modules, versions.nbytes, versions.created, versions.report,
       settings.settings
FROM names JOIN history ON history.name = names.name LEFT JOIN versions ON versions.digest = history.digest
     LEFT JOIN settings ON settings.name = names.name AND settings.pending = 0
{where} ORDER BY names.name, history.id
"""
_OF_VERSION = (
    "digest",
    "source",
    "published",
    "current",
    "rank",
    "target_modules",
    "nbytes",
    "created",
    "report",
)

Line = dict[str, Any]


@dataclass(slots=True)
class Noted:
    """The last state of each name and alias, and the number of lines that cannot be read."""

    names: dict[str, Line] = field(default_factory=dict)
    aliases: dict[str, Line] = field(default_factory=dict)
    unreadable: int = 0


class Journal:
    """The journal of one data folder. One writer at a time."""

    def __init__(self, data_dir: Path):
        self._path = data_dir / JOURNAL
        self._limit = 0

    def write(self, db: sqlite3.Connection) -> None:
        """Replace the journal by the state of the database."""
        lines = [*_name_lines(db), *map(alias_line, read_aliases(db).values())]
        text = b"".join(map(_encoded, lines))
        draft = self._path.with_name(JOURNAL + ".part")
        try:
            with draft.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._path)
        except OSError as error:
            log.warning("the journal of names could not be written: %s", error.strerror)
        self._limit = 2 * len(text) + _GROWTH_BYTES

    def append(self, line: Line) -> bool:
        """Add the state of a name or alias, durably. A failure is logged, because the database has the change; the next
        start writes the journal anew. Returns True when the journal should be written anew now."""
        try:
            with self._path.open("ab") as file:
                file.write(_encoded(line))
                file.flush()
                os.fsync(file.fileno())
                return 0 < self._limit < file.tell()
        except OSError as error:
            log.warning("the journal of names could not be written: %s", error.strerror)
            return False

    def read(self) -> Noted:
        """Return the last state of each name and alias."""
        found = Noted()
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            for text in file:
                line = _decoded(text)
                if line is None:
                    found.unreadable += 1
                elif "alias" in line:
                    found.aliases[line["alias"]] = line
                else:
                    found.names[line["name"]] = line
        return found


def name_line(db: sqlite3.Connection, name: str) -> Line:
    """Return the line of a name; a name that is gone has no versions."""
    return next(_name_lines(db, name), {"name": name, "versions": []})


def alias_line(alias: Alias) -> Line:
    return {"alias": alias.name, "created": alias.created, "weights": dict(alias.weights)}


def no_alias_line(name: str) -> Line:
    return {"alias": name, "weights": {}}


def _name_lines(db: sqlite3.Connection, name: str | None = None) -> Iterator[Line]:
    query = _QUERY.format(where="WHERE names.name = ?" if name else "")
    with closing(db.execute(query, (name,) if name else ())) as cursor:
        for key, group in groupby(cursor, key=itemgetter("name")):
            rows = list(group)
            versions = [{column: row[column] for column in _OF_VERSION} for row in rows]
            of_name = {"pinned": rows[0]["pinned"], "created": rows[0]["named"], "settings": rows[0]["settings"]}
            yield {"name": key, **of_name, "versions": versions}


def _encoded(line: Mapping[str, Any]) -> bytes:
    text = json.dumps(line, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decoded(text: bytes) -> Line | None:
    """Parse a line; None if it is torn or damaged."""
    checksum, _, body = text.rstrip(b"\n").partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(body):
            return None
        line: Line = json.loads(body)
    except ValueError:
        return None
    return line


def stored_versions(line: Line, stored: Iterable[str]) -> list[Line]:
    """Return the versions of a name's line that are in the store and described in full, oldest first."""
    there = set(stored)
    return [version for version in line["versions"] if version["digest"] in there and version["report"] is not None]

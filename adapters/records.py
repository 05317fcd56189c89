"""What is known of an adapter: its versions, and the name that points to one of them."""

import json
import re
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from adapters.traits import Traits

_VERSION = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")


@dataclass(frozen=True, slots=True)
class Inspected:
    """What is known of an adapter that passed: `rank` is the largest of its modules, `target_modules` the sorted last
    parts of their names, `nbytes` the size of its tensors in bytes, `report` what the API answers."""

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    nbytes: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable content: `digest` is 64 hex digits, `nbytes` the size of its tensors, `created` in Unix seconds.

    The report stays JSON until it is asked for: as text it takes a fifth of the memory."""

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    nbytes: int
    created: int
    report_json: str

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report_json)
        return report

    @property
    def traits(self) -> Traits:
        return Traits.of(self.report)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name and the version it points to; `source` is where that version came from, `created` when the name was
    first published, in Unix seconds."""

    name: str
    version: AdapterVersion
    source: str
    pinned: bool
    created: int


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A version that a name points or pointed to; `created` is when it was published under the name."""

    digest: str
    created: int
    current: bool


@dataclass(frozen=True, slots=True)
class PendingAdapter:
    """An adapter that is to be fetched from `source` and published; `error` says why that failed, `created` is when it
    was asked for, in Unix seconds."""

    name: str
    source: str
    replacing: bool
    pinned: bool
    created: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """All that is kept in memory of one name: `versions` are the stored ones, newest first; `damage` says why the
    current one cannot be served."""

    record: AdapterRecord
    versions: tuple[AdapterRecord, ...]
    history: tuple[HistoryEntry, ...]
    damage: str | None

    def matching(self, version: str) -> AdapterRecord | None:
        """The stored version that `version` abbreviates, if it is exactly one."""
        match = _VERSION.fullmatch(version)
        found = [record for record in self.versions if match and record.version.digest.startswith(match[1])]
        return found[0] if len(found) == 1 else None

    def previous(self) -> AdapterRecord | None:
        """The newest stored version that was published before the current one."""
        stored = {record.version.digest: record for record in self.versions}
        from_current = dropwhile(lambda version: not version.current, self.history)
        return next((stored[v.digest] for v in from_current if not v.current and v.digest in stored), None)

    def digests(self) -> set[str]:
        """Of the history, stored or not."""
        return {version.digest for version in self.history}

"""Records of an adapter: its immutable versions, and the name that points to one of them."""

import json
import math
import re
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from adapters.traits import Traits

_VERSION = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")


@dataclass(frozen=True, slots=True)
class Inspected:
    """Metadata of an adapter that passed validation: `rank` is the largest rank of its modules, `target_modules` the
    sorted last components of their names, `nbytes` the size of its tensors in bytes, `report` the report returned by
    the API. `structure` identifies everything but the numbers of a LoRA: its config, and the names, dtypes and shapes
    of its tensors; `largest` is its largest number, and `has_zeros` tells whether a tensor has nothing but zeros."""

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    nbytes: int
    report: dict[str, Any]
    structure: str | None = None  # None for other types
    largest: float = math.inf
    has_zeros: bool = True


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable content: `digest` is 64 hex digits, `nbytes` the size of its tensors in bytes, `created` in Unix
    seconds.

    The report is kept as JSON text, which takes a fifth of the memory of the parsed object.
    """

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    nbytes: int
    created: int
    report_json: str

    @property
    def report(self) -> dict[str, Any]:
        """The validation report, parsed on every access."""
        report: dict[str, Any] = json.loads(self.report_json)
        return report

    @property
    def traits(self) -> Traits:
        return Traits.of(self.report)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name and the version it points to; `source` is the origin of that version, `created` the time when the name
    was first published, in Unix seconds, `settings_json` what is stored for the name, a JSON object or ""."""

    name: str
    version: AdapterVersion
    source: str
    pinned: bool
    created: int
    settings_json: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The name's settings, parsed on every access; none if they are damaged, as `Entry.damage` then says."""
        try:
            settings: dict[str, Any] = json.loads(self.settings_json or "{}")
        except ValueError:
            return {}
        return settings


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A version that a name points or pointed to; `created` is the time when it was published under the name, in
    Unix seconds."""

    digest: str
    created: int
    current: bool


@dataclass(frozen=True, slots=True)
class PendingAdapter:
    """An adapter still to be fetched from `source` and published; `error` is the reason of the last failure,
    `created` the time of the request, in Unix seconds, `settings_json` the changes in the name's settings."""

    name: str
    source: str
    replacing: bool
    pinned: bool
    created: int
    error: str | None = None
    settings_json: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """Everything kept in memory for one name: `versions` are the stored versions, newest first; `damage` is the
    reason why the current version cannot be served, or None."""

    record: AdapterRecord
    versions: tuple[AdapterRecord, ...]
    history: tuple[HistoryEntry, ...]
    damage: str | None

    def matching(self, version: str) -> AdapterRecord | None:
        """Return the stored version whose digest starts with `version` (12 or more hex digits); None unless exactly
        one does."""
        match = _VERSION.fullmatch(version)
        found = [record for record in self.versions if match and record.version.digest.startswith(match[1])]
        return found[0] if len(found) == 1 else None

    def previous(self) -> AdapterRecord | None:
        """Return the newest stored version that was published before the current one, or None."""
        stored = {record.version.digest: record for record in self.versions}
        from_current = dropwhile(lambda version: not version.current, self.history)
        return next((stored[v.digest] for v in from_current if not v.current and v.digest in stored), None)

    def digests(self) -> set[str]:
        """Return the digests of all versions in the history, stored or not."""
        return {version.digest for version in self.history}

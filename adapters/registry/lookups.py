"""Lookups of names, records and versions in the registry, without a lock."""

from collections.abc import Iterator
from itertools import islice

from adapters.errors import AdapterNotFound
from adapters.records import AdapterRecord, AdapterVersion, Entry, HistoryEntry
from adapters.registry.index import RegistryIndex


class Lookups:
    """Methods may be called from any thread. They see the state of the last finished write and never wait."""

    _index: RegistryIndex

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return self._index.get(name) is not None

    def resolve(self, model: str) -> AdapterRecord:
        """Return the record that `name` points to now, or the stored version for `name@<12 or more hex digits>`.

        Raises `AdapterNotFound`, with one message for everything that cannot be served.
        """
        name, at, version = model.partition("@")
        entry = self._index.get(name)
        if entry is not None and at:
            record = entry.matching(version)
            if record is not None:
                return record
        elif entry is not None and entry.damage is None:
            return entry.record
        raise not_found(model)

    def record(self, name: str) -> AdapterRecord:
        """Return the record of `name`, damaged or not. Raises `AdapterNotFound`."""
        return self._entry(name).record

    def records(self, *, limit: int = 100, after: str = "") -> tuple[list[AdapterRecord], bool]:
        """Return up to `limit` records in name order after the name `after`, damaged ones included; and True if more
        follow."""
        found = list(islice(self.walk(after), limit + 1))
        return found[:limit], len(found) > limit

    def walk(self, after: str = "") -> Iterator[AdapterRecord]:
        """Iterate over all records in name order after the name `after`, damaged ones included."""
        return self._index.walk(after)

    def history(self, name: str) -> list[HistoryEntry]:
        """Return the retained versions of `name`, newest first. Raises `AdapterNotFound`."""
        return list(self._entry(name).history)

    def version_sizes(self, name: str) -> dict[str, int]:
        """Return the bytes of the weights of each stored version of `name`, by digest; none for an unknown name."""
        entry = self._index.get(name)
        return {} if entry is None else {stored.version.digest: stored.version.nbytes for stored in entry.versions}

    def version(self, name: str, digest: str) -> AdapterVersion | None:
        """Return a version of `name`; None if it is no longer stored. Raises `AdapterNotFound`."""
        record = self._entry(name).matching(digest)
        return record.version if record else None

    def names_of(self, digest: str) -> list[str]:
        """Return the names that point to `digest` now, sorted."""
        return list(self._index.names_of(digest))

    def digests(self) -> set[str]:
        """Return the digests of all versions that a name points to now."""
        return self._index.digests()

    def _entry(self, name: str) -> Entry:
        entry = self._index.get(name)
        if entry is None:
            raise not_found(name)
        return entry


def not_found(model: str) -> AdapterNotFound:
    return AdapterNotFound(f"The model {model[:200]!r} does not exist.")

"""In-memory index of the registry: lookup by name, iteration in name order, lookup by the version that names point
to."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice

from adapters.records import AdapterRecord, Entry


class RegistryIndex:
    """Entries by name. One writer at a time; readers take no lock and see each `put` completely or not at all.

    This rests on two invariants: a dictionary's item is replaced in one step, and every object that readers iterate
    over (the list of names, the tuples of `names_of`) is replaced and never modified.
    """

    def __init__(self, entries: dict[str, Entry]):
        self._entries = entries
        self._names = sorted(entries)
        pointing: dict[str, list[str]] = {}
        for name in self._names:
            pointing.setdefault(_digest(entries[name]), []).append(name)
        self._pointing = {digest: tuple(names) for digest, names in pointing.items()}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Entry | None:
        """Return the entry of `name`, or None."""
        return self._entries.get(name)

    def walk(self, after: str) -> Iterator[AdapterRecord]:
        """Iterate over the records in name order after the name `after`. Adapters published meanwhile may be
        missing."""
        names = self._names
        for name in islice(names, bisect_right(names, after), None):
            entry = self._entries.get(name)
            if entry is not None:
                yield entry.record

    def names_of(self, digest: str) -> tuple[str, ...]:
        """Return the names that point to `digest`, sorted."""
        return self._pointing.get(digest, ())

    def digests(self) -> set[str]:
        """Return the digests of all versions that a name points to."""
        return set(self._pointing)

    def put(self, name: str, entry: Entry | None) -> Entry | None:
        """Replace or (None) remove the entry of `name`; returns the previous entry. A version is listed under its
        new name before it is removed from the old one, so that it never appears to be unused."""
        old = self._entries.get(name)
        moved = old is None or entry is None or _digest(old) != _digest(entry)
        if entry is not None:
            if moved:
                self._point(_digest(entry), [*self.names_of(_digest(entry)), name])
            self._entries[name] = entry
            if old is None:
                at = bisect_left(self._names, name)
                self._names = [*self._names[:at], name, *self._names[at:]]
        elif old is not None:
            at = bisect_left(self._names, name)
            self._names = [*self._names[:at], *self._names[at + 1 :]]
            del self._entries[name]
        if old is not None and moved:
            self._point(_digest(old), [other for other in self.names_of(_digest(old)) if other != name])
        return old

    def _point(self, digest: str, names: list[str]) -> None:
        if names:
            self._pointing[digest] = tuple(sorted(names))
        else:
            del self._pointing[digest]


def _digest(entry: Entry) -> str:
    return entry.record.version.digest

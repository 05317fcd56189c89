"""Host tier: versions read, validated and packed, ready to be copied to the device. Bounded in bytes, LRU."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class HostCache(Generic[T]):
    """Packed versions by digest, up to `max_bytes` bytes. The least recently used entries are evicted first. The
    newest entry always stays, because a caller needs it right now."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[str, T] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def is_full(self) -> bool:
        """Return True if the entries reach `max_bytes`."""
        return self.nbytes >= self.max_bytes

    def digests(self) -> list[str]:
        """Return the digests, least recently used first."""
        return list(self._entries)

    def peek(self, digest: str) -> T | None:
        """Return the entry without touching LRU order; None if it is absent."""
        return self._entries.get(digest)

    def get(self, digest: str) -> T | None:
        """Return the entry and mark it as the most recently used one; None if it is absent."""
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def put(self, digest: str, entry: T) -> list[str]:
        """Add an entry; returns the digests evicted for it."""
        self.drop(digest)
        self._entries[digest] = entry
        self.nbytes += entry.nbytes
        evicted = []
        while self.nbytes > self.max_bytes and len(self._entries) > 1:
            oldest = next(iter(self._entries))
            self.drop(oldest)
            evicted.append(oldest)
        return evicted

    def drop(self, digest: str) -> None:
        """Remove the entry, if there is one."""
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.nbytes -= entry.nbytes

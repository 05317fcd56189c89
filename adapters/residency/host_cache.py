"""Host tier: versions read, checked and packed, ready to be copied to the device. Bounded by bytes, LRU."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class HostCache(Generic[T]):
    """Least recently used entries go first. The newest entry always stays: something wants it right now."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[str, T] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def is_full(self) -> bool:
        return self.nbytes >= self.max_bytes

    def digests(self) -> list[str]:
        return list(self._entries)

    def peek(self, digest: str) -> T | None:
        """Without using it."""
        return self._entries.get(digest)

    def get(self, digest: str) -> T | None:
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def put(self, digest: str, entry: T) -> list[str]:
        """Add an entry; returns the digests that had to go for it."""
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
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.nbytes -= entry.nbytes

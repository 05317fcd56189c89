"""Reading of versions into host memory: once for each load, and once for all that a self-test compares. No torch in
here."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

W = TypeVar("W")


@dataclass(slots=True)
class _Shared(Generic[W]):
    """A version under self-test, with its weights once a thread has read them."""

    verify: bool
    users: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)
    weights: W | None = None


class WeightsReader(Generic[W]):
    """Reads the weights of versions with `load(digest, verify)`, which may raise `AdapterError`.

    Between `share` and `unshare` a version is read once, for the residency and for the reference of its self-test.
    The engine's thread calls `share` and `unshare`; any thread may call `read`.
    """

    def __init__(self, load: Callable[[str, bool], W]) -> None:
        self._load = load
        self._shared: dict[str, _Shared[W]] = {}

    def share(self, digest: str, *, verify: bool) -> None:
        """Keep the weights of the version from the next `read` until `unshare`. Without `verify`, the digest of the
        stored bytes is not verified, because it was computed from these bytes a moment ago."""
        self._shared.setdefault(digest, _Shared(verify)).users += 1

    def unshare(self, digest: str) -> None:
        """End one `share` of the version."""
        shared = self._shared[digest]
        shared.users -= 1
        if not shared.users:
            del self._shared[digest]

    def is_shared(self, digest: str) -> bool:
        """Return True between `share` and `unshare` of the version."""
        return digest in self._shared

    def read(self, digest: str) -> W:
        """Return the weights of a version. Raises `AdapterError`."""
        shared = self._shared.get(digest)
        if shared is None:
            return self._load(digest, True)
        with shared.reading:
            if shared.weights is None:
                shared.weights = self._load(digest, shared.verify)
            return shared.weights

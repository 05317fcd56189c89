"""Reading of versions for the residency: from the packed copy on disk, or else from the version's own files."""

import logging
from collections.abc import Callable

from adapters.fault_points import fault_point
from adapters.registry.packed_files import PackedFiles
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.packed_format import PackedFileDamaged, PackedLayout, decode, encode
from adapters.weights import AdapterWeights
from server.engine.weights_reader import WeightsReader

log = logging.getLogger(__name__)


class PackedReads:
    """`read` and `keep` of the residency, called in its reader threads. Without `files`, nothing is kept.

    A version under self-test is packed from its weights, which are in memory for the reference anyway.
    """

    def __init__(
        self,
        reader: WeightsReader[AdapterWeights],
        pack: Callable[[AdapterWeights], PackedAdapter],
        files: PackedFiles | None,
        layout: PackedLayout,
        *,
        pinned: bool,
    ) -> None:
        self._reader = reader
        self._pack = pack
        self._files = files
        self._layout = layout
        self._pinned = pinned

    def read(self, digest: str) -> PackedAdapter:
        """Return the version, packed. Raises `AdapterError`."""
        fault_point("engine.load")
        kept = None if self._reader.is_shared(digest) else self._kept(digest)
        return kept or self._pack(self._reader.read(digest))

    def keep(self, digest: str, packed: PackedAdapter) -> None:
        """Write the packed copy of a version that was read from its own files."""
        parts = encode(digest, packed, self._layout) if self._files is not None else None
        if self._files is not None and parts is not None:
            self._files.write(digest, parts)

    def _kept(self, digest: str) -> PackedAdapter | None:
        """Return the packed copy. A damaged file is removed, and None is returned."""
        file = self._files.open(digest) if self._files is not None else None
        if self._files is None or file is None:
            return None
        with file:
            try:
                return decode(file, digest, self._layout, pinned=self._pinned)
            except (PackedFileDamaged, OSError) as error:
                log.warning("the packed copy of adapter %s is made again: %s", digest, error)
        self._files.discard(digest)
        return None

"""How adapters get from host memory to the device's pool.

To a GPU: the rank columns of a version are read into pinned memory, in one piece. They cross in one transfer on a
stream of their own and are then dealt out to the slot's pages by copies on the device, while steps run on theirs. The
reader thread, and not the step, waits for the event behind all that; only then does it report the slot as filled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from adapters.residency.slots import Slot
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool

Write = Callable[[Slot, PackedAdapter], None]  # fills the slot; when it returns, any stream may read it


class CudaCopies:
    """Not yet run on a GPU."""

    def __init__(self, pool: AdapterPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        # A step on its way may still read what one of its sequences has let go of.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with self._own_stream():
            self._pool.write(slot, replace(packed, columns=packed.columns.to(self._device)))
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        arrived.synchronize()

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Of this thread alone: what others queue stays on their streams."""
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream


def writer(pool: AdapterPool, device: torch.device) -> Write:
    """Called in reader threads."""
    return CudaCopies(pool, device).write if device.type == "cuda" else pool.write

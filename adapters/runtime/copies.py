"""Copies from host memory to the device's pool.

To a GPU: the rank columns of a version are read into pinned memory, in one piece. They are transferred once, on a
separate stream, and then distributed to the slot's pages by copies on the device while steps run on their own stream.
The reader thread, not the step, waits for the event after the last copy; only then does it report the slot as filled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from adapters.residency.slots import Slot
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool

Write = Callable[[Slot, PackedAdapter], None]  # writes the slot; after it returns, any stream may read the slot


class CudaCopies:
    """Copies on a stream of their own. Not yet run on a GPU."""

    def __init__(self, pool: AdapterPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Write the adapter into the slot, and return after the last copy."""
        # A step in flight may still read the pages of a sequence that has released them.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with self._own_stream():
            self._pool.write(slot, replace(packed, columns=packed.columns.to(self._device)))
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        # Memory that is freed while a step in flight reads it must not be reused by the next copy.
        for tensor in self._pool.extra_tensors(slot.index):
            tensor.record_stream(torch.cuda.default_stream(self._device))
        arrived.synchronize()

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Return the stream's context. It is local to this thread: other threads' work stays on their streams."""
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream


def writer(pool: AdapterPool, device: torch.device) -> Write:
    """Return the function that writes a slot on `device`. It is called in reader threads."""
    return CudaCopies(pool, device).write if device.type == "cuda" else pool.write

"""How adapters get from host memory to the device's pool.

To a GPU: a reader thread puts A and B of all modules into one piece of pinned memory. They cross in one transfer on a
stream of their own and are then dealt out to the slot's pages by copies on the device, while steps run on theirs. The
thread, and not the step, waits for the event behind all that; only then does it report the slot as filled.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch

from adapters.pack import PackedAdapter
from adapters.pool import AdapterPool
from adapters.slots import Slot


class Copies(Protocol):
    """Both are called in reader threads."""

    def stage(self, packed: PackedAdapter) -> PackedAdapter:
        """The same adapter, in memory that it can be copied from at full speed."""

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        """Fill `slot`; when it returns, any stream may read it."""


class HostCopies:
    """For a pool in host memory."""

    def __init__(self, pool: AdapterPool) -> None:
        self.write = pool.write

    def stage(self, packed: PackedAdapter) -> PackedAdapter:
        return packed


class CudaCopies:
    """Not yet run on a GPU."""

    def __init__(self, pool: AdapterPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def stage(self, packed: PackedAdapter) -> PackedAdapter:
        return in_one_piece(packed, pinned=True)

    def write(self, slot: Slot, packed: PackedAdapter) -> None:
        # A step that samples nothing is not waited for: it may still read what its last sequence has let go of.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with self._own_stream():
            self._pool.write(slot, moved(packed, self._device))
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        arrived.synchronize()

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Of this thread alone: what others queue stays on their streams."""
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream


def copies_for(pool: AdapterPool, device: torch.device) -> Copies:
    return CudaCopies(pool, device) if device.type == "cuda" else HostCopies(pool)


def in_one_piece(packed: PackedAdapter, pinned: bool = False) -> PackedAdapter:
    """A and B of all modules as views of one flat tensor, `packed.flat`."""
    tensors = [tensor for pair in packed.modules.values() for tensor in pair]
    if not tensors:
        return packed
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, pin_memory=pinned)
    placed = _over(flat, packed)
    for name, pair in packed.modules.items():
        for target, source in zip(placed[name], pair, strict=True):
            target.copy_(source)
    return replace(packed, modules=placed, flat=flat)


def moved(packed: PackedAdapter, device: torch.device) -> PackedAdapter:
    """The same with A and B on `device`, in one transfer."""
    if packed.flat is None:
        return packed
    flat = packed.flat.to(device, non_blocking=True)
    return replace(packed, modules=_over(flat, packed), flat=flat)


def _over(flat: torch.Tensor, packed: PackedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    shapes = [tensor.shape for pair in packed.modules.values() for tensor in pair]
    views = [
        part.view(shape) for part, shape in zip(torch.split(flat, [s.numel() for s in shapes]), shapes, strict=True)
    ]
    return dict(zip(packed.modules, zip(views[::2], views[1::2], strict=True), strict=True))

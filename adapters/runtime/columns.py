"""The rank columns of one version: A and B of all its linears in one contiguous tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankColumns:
    """A `[rows, in]` and B `[rows, out]` of each linear in `widths` (name → in, out), one after the other in `flat`.
    One tensor means one transfer to a device, and one object for the garbage collector."""

    flat: Tensor
    rows: int
    widths: Mapping[str, tuple[int, int]]

    @classmethod
    def zeros(
        cls, rows: int, widths: Mapping[str, tuple[int, int]], dtype: torch.dtype, *, pinned: bool = False
    ) -> "RankColumns":
        """Allocate zeroed columns, in pinned memory if `pinned`."""
        return cls(torch.zeros(rows * sum(map(sum, widths.values())), dtype=dtype, pin_memory=pinned), rows, widths)

    def views(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return views of A and B by name."""
        sizes = [width for pair in self.widths.values() for width in pair]
        parts = torch.split(self.flat, [self.rows * size for size in sizes])
        views = [part.view(self.rows, size) for part, size in zip(parts, sizes, strict=True)]
        return dict(zip(self.widths, zip(views[::2], views[1::2], strict=True), strict=True))

    def to(self, device: torch.device) -> "RankColumns":
        """Return the columns on `device`; the copy is asynchronous, in order on the device's current stream."""
        return replace(self, flat=self.flat.to(device, non_blocking=True))

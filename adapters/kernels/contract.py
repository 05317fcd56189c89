"""The contract of the LoRA product.

    y_l[s.start:s.end] += s.scale * (x[s.start:s.end] @ a[l, s.lo:s.hi].T) @ b_l[s.lo:s.hi]

for every segment s and each of up to three sibling linears l, which read one input:

    x  [rows, in_features]              the linears' input
    y  [rows, sum(sizes)]               their outputs side by side, changed in place; rows outside every segment are
                                        bit-identical
    a  [linears, columns, in_features]  the pool's A, one row per rank column
    b  flat                             the linears' `[columns, size]` one after the other: the pool's B transposed,
                                        with the adapter's scaling folded in

All four have one dtype. Segments of different columns may cover the same rows; such segments are adjacent in the order.
Unused columns may hold any finite numbers. `plan_segments` is called once per step, `add_lora` once per group of
siblings.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from adapters.kernels.segments import Segments


class LoRAKernel(Protocol):
    """An implementation of the LoRA product; `name` identifies it in logs."""

    name: str

    def plan_segments(self, segments: Segments) -> Any:
        """Return the kernel's plan for the step's segments, the `plan` argument of `add_lora`."""

    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, ...], plan: Any
    ) -> None:
        """Add the delta of `plan`'s segments to `y` in place; shapes as in the module's docstring."""


def split_b(b: torch.Tensor, columns: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return views of the linears' own `[columns, size]` in a flat b."""
    parts = torch.split(b, [columns * size for size in sizes])
    return [part.view(columns, size) for part, size in zip(parts, sizes, strict=True)]

"""The contract of the LoRA product.

    y_l[s.start:s.end] += s.scale * (x[s.start:s.end] @ a[l, s.lo:s.hi].T) @ b_l[s.lo:s.hi]

for every segment s and each of up to three sibling linears l, which read one input:

    x  [rows, in_features]              the linears' input
    y  [rows, sum(sizes)]               their outputs side by side, changed in place; rows outside every segment keep
                                        their bits
    a  [linears, columns, in_features]  the pool's A, one row per rank column
    b  flat                             the linears' `[columns, size]` one after the other: the pool's B transposed,
                                        with the adapter's scaling folded in

All four have one dtype. Segments of different columns may have the same rows; then they follow each other. Unused
columns may hold anything finite. `plan` is called once per step, `add_lora` once per group of siblings.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from adapters.kernels.segments import Segments


class LoRAKernel(Protocol):
    name: str

    def plan(self, segments: Segments) -> Any:
        """Whatever the kernel derives from the step's segments."""

    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, ...], plan: Any
    ) -> None: ...


def split_b(b: torch.Tensor, columns: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The linears' own `[columns, size]` within a flat b."""
    parts = torch.split(b, [columns * size for size in sizes])
    return [part.view(columns, size) for part, size in zip(parts, sizes, strict=True)]

"""The reference implementation of the LoRA product, against which every kernel is tested."""

import torch

from adapters.kernels.contract import split_b
from adapters.kernels.segments import Segments


class ReferenceKernel:
    """The contract in float32, segment by segment."""

    name = "reference"

    def plan_segments(self, segments: Segments) -> Segments:
        return segments

    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, ...], plan: Segments
    ) -> None:
        rows = sorted({row for s in plan.items for row in range(s.start, s.end)})
        for own_y, own_a, own_b in zip(torch.split(y, list(sizes), 1), a, split_b(b, a.shape[1], sizes), strict=True):
            delta = torch.zeros_like(own_y, dtype=torch.float32)
            for s in plan.items:
                v = s.scale * (x[s.start : s.end].float() @ own_a[s.lo : s.hi].float().T)
                delta[s.start : s.end] += v @ own_b[s.lo : s.hi].float()
            own_y[rows] = (own_y[rows].float() + delta[rows]).to(y.dtype)

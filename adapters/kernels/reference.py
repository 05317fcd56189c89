"""The specification: every kernel is tested against this."""

import torch

from adapters.segments import Segments


class ReferenceKernel:
    name = "reference"

    def plan(self, segments: Segments) -> Segments:
        return segments

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: Segments) -> None:
        delta = torch.zeros_like(y, dtype=torch.float32)
        for s in plan.items:
            v = s.scale * (x[s.start : s.end].float() @ a[s.lo : s.hi].float().T)
            delta[s.start : s.end] += v @ b[s.lo : s.hi].float()
        rows = sorted({row for s in plan.items for row in range(s.start, s.end)})
        y[rows] = (y[rows].float() + delta[rows]).to(y.dtype)

"""Large zeroed tensors whose memory is allocated as they are filled."""

import math

import numpy as np
import torch

_ALIGNMENT = 64  # a cache line


def zeros(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a zeroed tensor of `size`. `torch.zeros` writes every page; here, on a CPU, memory is taken only when
    something is first stored in a page, because the kernel hands out zeroed pages."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    nbytes = math.prod(size) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype).view(size)

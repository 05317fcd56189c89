"""How a step's metadata gets to the device, and how its results come back: one copy each way."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16  # bytes, of each of several arrays in one copy


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """One copy; to a GPU from pinned memory, so that it does not wait for the work before it. On a CPU the tensor
    shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def upload_all(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of numbers of any kinds, in one copy."""
    kinds = [torch.from_numpy(array[:0]).dtype for array in arrays]
    sizes = [(array.nbytes // ALIGNMENT + 1) * ALIGNMENT for array in arrays]  # torch cannot reinterpret nothing at all
    packed = np.zeros(sum(sizes), dtype=np.uint8)
    for array, end, size in zip(arrays, accumulate(sizes), sizes, strict=True):
        packed[end - size :][: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    parts = torch.split(upload(packed, device), sizes)
    return [
        part[: array.nbytes].view(kind).view(array.shape)
        for part, kind, array in zip(parts, kinds, arrays, strict=True)
    ]


def download(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin the copy of `tensor` to the host; the call waits for that copy, not for work that was queued after it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return host

    return wait

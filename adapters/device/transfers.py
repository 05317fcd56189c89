"""Transfers of a step's metadata to the device and of its results back: one copy each way."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16  # of each array in a combined copy, in bytes


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device once; to a GPU from pinned memory, so that the copy does not wait for earlier
    work. On a CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def upload_all(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Copy several arrays of any numeric dtypes to the device in one copy."""
    kinds = [torch.from_numpy(array[:0]).dtype for array in arrays]
    # Never 0, because torch cannot reinterpret an empty tensor.
    sizes = [(array.nbytes // ALIGNMENT + 1) * ALIGNMENT for array in arrays]
    packed = np.zeros(sum(sizes), dtype=np.uint8)
    for array, end, size in zip(arrays, accumulate(sizes), sizes, strict=True):
        packed[end - size :][: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    parts = torch.split(upload(packed, device), sizes)
    return [
        part[: array.nbytes].view(kind).view(array.shape)
        for part, kind, array in zip(parts, kinds, arrays, strict=True)
    ]


def download(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start the copy of `tensor` to the host. The returned function waits for that copy, not for work queued after
    it, and returns the host tensor."""
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

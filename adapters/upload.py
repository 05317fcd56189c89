"""How a step's metadata gets to the device."""

from typing import Any

import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """One copy; to a GPU from pinned memory, so that it does not wait for the work before it. On a CPU the tensor
    shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

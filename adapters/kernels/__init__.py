"""The LoRA product: its contract (contract.py), its implementations, and the choice among them."""

import torch

from adapters.device.cpp_build import load
from adapters.device.forms import NativeUnavailable
from adapters.kernels.contract import LoRAKernel
from adapters.kernels.cpu import SOURCE, NativeKernel
from adapters.kernels.grouped import GroupedKernel


def choose_kernel(device: torch.device, dtype: torch.dtype) -> tuple[LoRAKernel, str]:
    """Return the fastest kernel for `device` and `dtype`, and the reason for the choice in words for the log."""

    if device.type == "cuda":
        return _for_cuda(device)
    if device.type != "cpu":
        return GroupedKernel(device), f"torch matmuls: there is no native kernel for {device.type}"
    if dtype not in NativeKernel.DTYPES:
        return GroupedKernel(device), f"torch matmuls: the native kernel does not know {dtype}"
    try:
        return NativeKernel(load(SOURCE)), "native C++ kernel"
    except NativeUnavailable as unavailable:
        return GroupedKernel(device), f"torch matmuls: {unavailable}"


def _for_cuda(device: torch.device) -> tuple[LoRAKernel, str]:

    try:
        from adapters.kernels.triton_lora import TritonKernel
    except ImportError as error:
        return GroupedKernel(device), f"torch matmuls: Triton cannot be imported ({error})"
    return TritonKernel(device), "Triton kernels"

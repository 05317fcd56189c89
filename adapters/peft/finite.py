"""Checks for NaN and infinity. A file is read in chunks and never held in memory as a whole."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from adapters.errors import Problem
from adapters.peft.lora_tensors import LoraTensors, problem
from adapters.peft.safetensors_header import TensorInfo
from adapters.peft.weights import read_chunks

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def number_problems(tensors: LoraTensors, scalings: Mapping[str, float]) -> Iterator[Problem]:
    """Yield a `nonfinite` problem for every tensor with NaN or infinity, and for every tensor that would overflow
    its own dtype when multiplied by its scaling."""
    for name, largest in magnitudes(tensors.path, tensors.infos):
        if not math.isfinite(largest):
            yield problem(name, "NaN or infinity", "finite numbers", "nonfinite")
        elif largest * scalings.get(name, 1.0) > torch.finfo(_DTYPES[tensors.infos[name].dtype]).max:
            yield problem(name, "infinity once scaled by alpha", "finite numbers", "nonfinite")


def magnitudes(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, float]]:
    """Yield the largest absolute value of each tensor; NaN or infinity where the tensor holds one."""
    with path.open("rb") as file:
        for name, info in tensors.items():
            chunks = (torch.frombuffer(chunk, dtype=_DTYPES[info.dtype]) for chunk in read_chunks(file, info))
            # aminmax propagates NaN to both results and is several times as fast as isfinite.
            extremes = [torch.stack(torch.aminmax(chunk)) for chunk in chunks]
            yield name, float(torch.cat(extremes).abs().max())

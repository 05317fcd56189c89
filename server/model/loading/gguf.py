"""GGUF files as dense transformers models."""

from pathlib import Path
from typing import Any

import torch
import transformers


def load_gguf(file: Path, dtype: torch.dtype) -> Any:
    """Read a GGUF file into an ordinary causal LM whose weights are dequantised to `dtype`."""
    packed = getattr(transformers, "GgufConfig", None)  # since it exists, weights stay packed unless told otherwise
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True, **options
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file, not the dense weights
    return model

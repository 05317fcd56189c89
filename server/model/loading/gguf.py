"""Loading of GGUF files as dense transformers models."""

from pathlib import Path
from typing import Any

import torch
import transformers

from server.model.loading.checkpoint import load_causal_lm


def load_gguf(file: Path, dtype: torch.dtype) -> Any:
    """Load a GGUF file as an ordinary causal LM whose weights are dequantized to `dtype`."""
    packed = getattr(transformers, "GgufConfig", None)  # versions with it keep weights packed by default
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = load_causal_lm(file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file, not the dense weights
    return model

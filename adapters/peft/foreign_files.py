"""Files that people take for an adapter's, recognised by their names or first bytes, and what helps. No torch."""

import re
from collections.abc import Iterable

from adapters.peft.files import WEIGHTS_FILE

PICKLE_FILE = "adapter_model.bin"  # what PEFT wrote before safetensors; reading a pickle can run code
MLX_FILE = "adapters.safetensors"  # what mlx-lm writes
GGUF_ENDING = ".gguf"
CONVERT = "`loraplex convert ADAPTER OUT`"
CONVERT_GGUF = "`loraplex convert FILE OUT --base MODEL`"
GATHERED = (
    "gathered weights: stage3_gather_16bit_weights_on_model_save in DeepSpeed's config, or the "
    "checkpoint's zero_to_fp32.py"
)
_THE_FILE = "the file itself: `git lfs pull` in the repository, or `hf download REPOSITORY`"
_TO_SAFETENSORS = f"safetensors: {CONVERT}"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer, which stands for the file", _THE_FILE),
    (rb"PK\x03\x04", f"a zip file, such as torch.save writes ({PICKLE_FILE})", _TO_SAFETENSORS),
    (rb"\x80[\x02-\x05]", f"a pickle, such as torch.save writes ({PICKLE_FILE})", _TO_SAFETENSORS),
    (rb"GGUF", "a GGUF file", f"safetensors: {CONVERT_GGUF}"),
    (rb"\x1f\x8b", "a gzip file", "the files in it: `tar -xzf` or `gunzip`"),
    (rb"(?i)\s*<(!doctype|html)", "a web page", _THE_FILE),
)
PEEKED_BYTES = 64


def foreign_weights(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return the name of the weights in another format among the files of a folder, what they are and the command that
    converts them. None if there are none, or if PEFT's weights are there as well."""
    found = sorted(names)
    if WEIGHTS_FILE in found:
        return None
    if PICKLE_FILE in found:
        return PICKLE_FILE, "a pickle", CONVERT
    if MLX_FILE in found:
        return MLX_FILE, "weights of MLX", CONVERT
    gguf = next((name for name in found if name.endswith(GGUF_ENDING)), None)
    return (gguf, "a GGUF file", CONVERT_GGUF) if gguf else None


def weights_instead(source: str, found: tuple[str, str, str]) -> str:
    """Return the message about a source that has only the weights of `foreign_weights`."""
    name, kind, command = found
    return f"The source {source[:200]!r} has {name[:100]!r}, {kind}, and no {WEIGHTS_FILE}; run {command}."


def foreign(data: bytes) -> tuple[str, str] | None:
    """Return what a file with these first bytes is and what to do, or None if it is nothing of the table."""
    return next(((found, expected) for start, found, expected in _FOREIGN if re.match(start, data)), None)

"""Files that people take for an adapter's, recognised by their first bytes, and what helps. No torch."""

import re

PICKLE_FILE = "adapter_model.bin"  # what PEFT wrote before safetensors; reading a pickle can run code
TO_SAFETENSORS = (
    """`python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in """
    """torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')"`"""
)
GATHERED = (
    "gathered weights: stage3_gather_16bit_weights_on_model_save in DeepSpeed's config, or the "
    "checkpoint's zero_to_fp32.py"
)
_THE_FILE = "the file itself: `git lfs pull` in the repository, or `hf download REPOSITORY`"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer, which stands for the file", _THE_FILE),
    (rb"PK\x03\x04", f"a zip file, such as torch.save writes ({PICKLE_FILE})", TO_SAFETENSORS),
    (rb"\x80[\x02-\x05]", f"a pickle, such as torch.save writes ({PICKLE_FILE})", TO_SAFETENSORS),
    (rb"GGUF", "a GGUF file", "the adapter in PEFT's format, as it was before its conversion to GGUF"),
    (rb"\x1f\x8b", "a gzip file", "the files in it: `tar -xzf` or `gunzip`"),
    (rb"(?i)\s*<(!doctype|html)", "a web page", _THE_FILE),
)
PEEKED_BYTES = 64


def pickle_instead(source: str) -> str:
    """Return the message about a source with weights in a pickle alone."""
    return f"The source {source[:200]!r} has {PICKLE_FILE} and no adapter_model.safetensors; run {TO_SAFETENSORS}."


def foreign(data: bytes) -> tuple[str, str] | None:
    """Return what a file with these first bytes is and what to do, or None if it is nothing of the table."""
    return next(((found, expected) for start, found, expected in _FOREIGN if re.match(start, data)), None)

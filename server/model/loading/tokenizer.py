"""Loads the base model's tokenizer with transformers, which knows how every kind of model stores it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from server.base_tokenizer import BaseTokenizer
from server.model.loading.loader import ModelRefused


def load_tokenizer(model: str) -> BaseTokenizer:
    """Load the tokenizer of `model`: a folder, a .gguf file or a hub id. Raises `ModelRefused`."""
    try:
        if model.endswith(".gguf"):
            found = AutoTokenizer.from_pretrained(Path(model).parent, gguf_file=Path(model).name)
        else:
            found = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"the tokenizer of '{model}' cannot be loaded: {error}") from error
    return describe(found)


def describe(tokenizer: Any) -> BaseTokenizer:
    """Describe a transformers tokenizer, without truncation and padding. Raises `ModelRefused` if it has no fast (Rust)
    backend, which incremental decoding requires."""
    if not tokenizer.is_fast:
        raise ModelRefused(f"{type(tokenizer).__name__} has no fast (Rust) version, which the server needs")
    backend, template = tokenizer.backend_tokenizer, tokenizer.chat_template
    backend.no_truncation()
    backend.no_padding()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    return BaseTokenizer(
        backend=backend.to_str(),
        chat_template=template.get("default") if isinstance(template, dict) else template,
        special_tokens=named,
        special_ids=sorted(tokenizer.all_special_ids),
    )

"""Meaning of the names of tensors in a PEFT LoRA file."""

import re
from functools import lru_cache
from typing import Literal, cast

KNOWN_TENSORS = 8192  # size of the cache of parsed names, which all adapters of a base share
TensorKind = Literal[
    "A", "B", "lora_bias", "magnitude", "embedding_A", "embedding_B", "tokens", "base_bias", "bias", "parameter"
]
# The module's name matches lazily: `q.lora_B.bias` is the bias of q's lora_B, not the bias of a module `q.lora_B`.
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(.+?)\.(?:"
    r"(?P<A>lora_A(?:\.[^.]+)?\.weight)|(?P<B>lora_B(?:\.[^.]+)?\.weight)|(?P<lora_bias>lora_B(?:\.[^.]+)?\.bias)|"
    r"(?P<magnitude>lora_magnitude_vector)|(?P<embedding_A>lora_embedding_A)|(?P<embedding_B>lora_embedding_B)|"
    r"(?P<tokens>token_adapter\.trainable_tokens_delta)|"
    r"(?P<base_bias>base_layer\.bias)|(?P<bias>bias)|(?P<parameter>[A-Za-z_][A-Za-z0-9_]*))"
)


@lru_cache(KNOWN_TENSORS)
def parse_tensor_name(name: str) -> tuple[str, TensorKind] | None:
    """Return the base model's module and the tensor's kind; None if no LoRA tensor can have the name.

    A trained bias is a `base_bias` where PEFT wrapped the layer and a `bias` where it did not. A `parameter` is one of
    the module's own, by the last component of the name.
    """
    match = _TENSOR_NAME.fullmatch(name)
    return (match[1], cast(TensorKind, match.lastgroup)) if match else None

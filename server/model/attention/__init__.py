"""Paged attention for transformers models: one function, registered with transformers' `AttentionInterface`.

transformers calls it per layer with the queries, keys and values of the step's flattened tokens and with the keywords
of the model call; those of the server are `batch` (the `ForwardBatch`) and `kv_cache`.
"""

from functools import cache
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from server.model.attention import paged
from server.model.batch import ForwardBatch
from server.model.cpu import attention as native
from server.model.cpu.library import why_unavailable
from server.model.kv_cache import KVCache

IMPLEMENTATION = "loraplex_paged"

# Keywords that models pass and that do not change the result here.
_INERT = {
    "dropout", "position_ids", "output_attentions", "output_hidden_states", "use_cache", "cache_position",
    "position_embeddings", "logits_to_keep", "return_dict", "is_causal", "layer_type", "past_key_values",
    "output_router_logits", "head_mask", "block_sequence_ids",
}  # fmt: skip


class PagedAttention(Protocol):
    """An implementation of paged attention with the contract of `paged.paged_attention`."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


@cache
def choose(device_type: str, dtype: torch.dtype) -> tuple[PagedAttention, str]:
    """Return the implementation for a device, and the reason as text for the log.

    cuda    Triton: one pass over the pages for prefill and decode together; suits CUDA graphs
    cpu     C++, if there is a compiler: reads keys and values in place
    others  plain torch: runs anywhere, and is the reference in tests

    A library's kernels (FlashInfer, FlashAttention) could be added here. None is, because none has been measured
    against these kernels on a GPU.
    """
    if device_type == "cpu":
        reason = why_unavailable(dtype)
        if reason is None:
            return native.paged_attention, "native C++ kernel"
        return paged.paged_attention, f"plain torch: {reason}"
    if device_type != "cuda":
        return paged.paged_attention, f"plain torch: there is no faster implementation for {device_type}"
    try:
        from server.model.attention import triton_paged
    except ImportError as error:
        return paged.paged_attention, f"plain torch: Triton cannot be imported ({error})"
    return triton_paged.paged_attention, "Triton kernels"


@cache
def launch_errors() -> tuple[type[Exception], ...]:
    """Return what a forward raises that this device cannot run: Triton has its own errors for a kernel that cannot be
    compiled, or that needs more than the device has."""
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


class UnsupportedAttention(ValueError):
    """The model uses an attention feature that the paged implementation does not compute."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: ForwardBatch,
    kv_cache: KVCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with `query` `[1, heads, rows, head_dim]`, `key` and `value` `[1, kv_heads, rows, head_dim]`.

    Returns `[1, rows, heads, head_dim]`. Raises `UnsupportedAttention` for keywords that would change the result.
    """
    unknown = [
        name for name, given in others.items() if name not in _INERT and given is not None and given is not False
    ]
    if unknown or attention_mask is not None:
        raise UnsupportedAttention(f"attention with {', '.join(unknown) or 'an explicit mask'} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    paged_attention, _ = choose(query.device.type, query.dtype)
    out = paged_attention(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        batch,
        kv_cache,
        scale,
        sliding_window,
        softcap,
    )
    return out[None], None


def register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)

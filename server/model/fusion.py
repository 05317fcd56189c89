"""Fused operations for decoder layers of Llama's structure: norms, SiLU·mul, rotary embedding with attention, or whole
layers.

The modules of the model stay; their `forward` is replaced if a module runs the same code as one of `WRITTEN` and the
replacement gives the same numbers. Equal numbers alone do not suffice: dependence on long contexts or large values does
not show in a short probe. Hooks on the modules, and so adapters, work as before. On a CPU a norm must be bit-identical,
because another order of summation flipped a near-tie of a greedy output. A GPU's own kernels differ among themselves by
more, so there the bound of the probe decides.
"""

import inspect
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from adapters.runtime.layers import LoRAGroup, LoRALinear
from server.model.batch import ForwardBatch
from server.model.cpu.block_ops import NativeBlockOps
from server.model.cpu.library import why_unavailable
from server.model.kv_cache import KVCache
from server.model.llama_layer import LayerParts

Undo = Callable[[], None]

# The modules whose code the operations below replace; modules of other architectures are mostly copies of these.
WRITTEN: dict[str, tuple[type[nn.Module], ...]] = {
    "norm": (LlamaRMSNorm,),
    "mlp": (LlamaMLP,),
    "attention": (LlamaAttention, MistralAttention, Qwen2Attention),
    "layer": (LlamaDecoderLayer,),
}


class BlockOps(Protocol):
    """The operations of a block besides its linears, on `[..., n]` tensors of one dtype. `exact`: norms must have the
    bits of the model's own."""

    @property
    def exact(self) -> bool: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return `x / sqrt(mean(x²) + eps)` over the last dimension, rounded, times `weight` `[n]`."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate) * up` from `[..., 2 * n]`, gate first."""

    def rope_attention(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Rotate queries and keys of `qkv` `[rows, (heads + 2 kv_heads) * head_dim]` by cos and sin `[rows, head_dim]`,
        store keys and values in the cache, attend, and return `[rows, heads * head_dim]`. May overwrite `qkv`."""

    def whole_layer(self, layer: nn.Module, parts: LayerParts) -> "WholeLayer | None":
        """Return an implementation of the whole `layer`; None if there is none."""


class WholeLayer(Protocol):
    def is_whole(self) -> bool:
        """Return whether it can compute the layer in this step; otherwise the modules do, bit-identically."""

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: ForwardBatch, cache: KVCache
    ) -> torch.Tensor:
        """Return the layer's output for `hidden` `[1, rows, size]`; cos and sin are `[1, rows, head_dim]`."""


def fuse(model: nn.Module, ops: BlockOps, windows: Mapping[int, int | None]) -> tuple[int, Undo]:
    """Replace operations in the blocks of `model`, whose linears must be wrapped, by `ops` where possible. Returns the
    number of changed modules and a function that undoes the changes. The caller must compare the model's logits before
    and after, because attention is not compared alone. `windows` are those of `CacheShape`."""
    found = {module: _replacement(module, ops, windows) for module in model.modules()}
    changed = {module: forward for module, forward in found.items() if forward is not None}
    whole = {module: _layer_forward(module, ops, windows, changed.keys()) for module in model.modules()}
    changed |= {module: forward for module, forward in whole.items() if forward is not None}
    for module, forward in changed.items():
        module.forward = forward

    def undo() -> None:
        for module in changed:
            del module.forward

    return len(changed), undo


def _replacement(module: nn.Module, ops: BlockOps, windows: Mapping[int, int | None]) -> Callable[..., Any] | None:
    return _norm_forward(module, ops) or _mlp_forward(module, ops) or _attention_forward(module, ops, windows)


def _norm_forward(module: Any, ops: BlockOps) -> Callable[..., torch.Tensor] | None:
    if not _runs(module, "norm"):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, module.weight, module.variance_epsilon)

    return forward if _agrees(module, forward, module.weight.numel(), module.weight, exactly=ops.exact) else None


def _mlp_forward(module: Any, ops: BlockOps) -> Callable[..., torch.Tensor] | None:
    group = _stacked_group(module, ("gate_proj", "up_proj")) if _runs(module, "mlp") else None
    if group is None or not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return None
    down = module.down_proj

    def forward(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = down(ops.silu_mul(group.forward(x)))
        return output

    return forward if _agrees(module, forward, group.in_features, down.weight) else None


def _attention_forward(module: Any, ops: BlockOps, windows: Mapping[int, int | None]) -> Callable[..., Any] | None:
    group = _stacked_group(module, ("q_proj", "k_proj", "v_proj")) if _runs(module, "attention") else None
    if group is None or module.layer_idx not in windows:
        return None

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *_: Any,
        batch: ForwardBatch,
        kv_cache: KVCache,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None
        cos, sin = position_embeddings
        window = windows.get(module.layer_idx)
        qkv = group.forward(hidden_states)[0]
        out = ops.rope_attention(module.layer_idx, qkv, cos[0], sin[0], batch, kv_cache, module.scaling, window)
        return module.o_proj(out[None]), None

    return forward


def _layer_forward(
    module: Any, ops: BlockOps, windows: Mapping[int, int | None], fused: AbstractSet[nn.Module]
) -> Callable[..., torch.Tensor] | None:
    """Return the fused forward of a layer whose children are all `fused`, so that both ways are equivalent."""
    if not _runs(module, "layer") or not fused >= set(module.children()):
        return None
    attention, mlp = module.self_attn, module.mlp
    groups = (linear.group for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj))
    norms = module.input_layernorm, module.post_attention_layernorm
    index = attention.layer_idx
    parts = LayerParts(index, tuple(groups), norms, attention.head_dim, attention.scaling, windows[index])
    whole = ops.whole_layer(module, parts)
    if whole is None:
        return None
    by_modules = module.forward

    def forward(
        hidden_states: torch.Tensor, *args: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        if whole.is_whole():
            return whole(hidden_states, *position_embeddings, kwargs["batch"], kwargs["kv_cache"])
        output: torch.Tensor = by_modules(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        return output

    return forward


def _runs(module: nn.Module, kind: str) -> bool:
    """Return whether its `forward` has the same bytecode as one in `WRITTEN`, whatever its class is called."""
    return _code(type(module)) in {_code(written) for written in WRITTEN[kind]}


def _code(kind: type[nn.Module]) -> tuple[bytes, tuple[str, ...]]:
    code = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names


def _stacked_group(module: nn.Module, names: tuple[str, ...]) -> LoRAGroup | None:
    """Return the group of exactly these children in this order, if there is one."""
    linears = [getattr(module, name, None) for name in names]
    first = linears[0]
    if not isinstance(first, LoRALinear) or not all(isinstance(linear, LoRALinear) for linear in linears):
        return None
    found = tuple(name.rpartition(".")[2] for name in first.group.names)
    same = all(linear.group is first.group for linear in linears if isinstance(linear, LoRALinear))
    return first.group if same and found == names else None


@torch.inference_mode()
def _agrees(
    module: nn.Module, forward: Callable[..., torch.Tensor], size: int, like: torch.Tensor, *, exactly: bool = False
) -> bool:
    """Return whether `forward` reproduces the module's output for random rows, exactly or within a few roundings."""
    rows = 64 if exactly else 3  # another order of summation changes few bits
    x = torch.randn(1, rows, size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    expected, got = module(x).float(), forward(x).float()
    step = 0.0 if exactly else 4 * torch.finfo(like.dtype).eps
    return got.shape == expected.shape and torch.allclose(got, expected, step, step * float(expected.abs().max()))


def block_ops(device: torch.device, dtype: torch.dtype) -> BlockOps | None:
    """Return the fused operations for a device; None if none are faster than the model's own."""
    if device.type == "cuda":
        return _for_cuda()
    if device.type != "cpu" or why_unavailable(dtype) is not None:
        return None
    return NativeBlockOps(dtype)


def _for_cuda() -> BlockOps | None:
    try:
        from server.model.fused.block_ops import TritonBlockOps
    except ImportError:
        return None
    return TritonBlockOps()

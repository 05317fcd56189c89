"""The arguments of decoder_layer.h: the same structures, filled from a layer's modules and from a step's tensors."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from adapters.kernels.cpu import LoRAView
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.stacked_linear import StackedLinear
from server.model.batch import ForwardBatch
from server.model.cpu.attention import NativeAttentionPlan
from server.model.cpu.linear import NativeLinear
from server.model.llama_layer import LayerParts

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Vectors(ctypes.Structure):
    _fields_ = [("start", _SIZE), ("end", _SIZE), ("first", _SIZE), ("size", _SIZE), ("vectors", _POINTER)]


class Linears(ctypes.Structure):
    _fields_ = [
        ("packed", _POINTER), ("bias", _POINTER), ("in_features", _SIZE), ("out_features", _SIZE), ("a", _POINTER),
        ("b", _POINTER), ("columns", _SIZE), ("siblings", _SIZE), ("sizes", _SIZE * 3),
        ("inputs", ctypes.POINTER(Vectors)), ("num_inputs", _SIZE),
        ("outputs", ctypes.POINTER(Vectors)), ("num_outputs", _SIZE),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linears), ("o", Linears), ("gate_up", Linears), ("down", Linears), ("attention_norm", _POINTER),
        ("mlp_norm", _POINTER), ("attention_eps", _FLOAT), ("mlp_eps", _FLOAT), ("scale", _FLOAT),
        ("kv_heads", _SIZE), ("head_dim", _SIZE), ("window", _SIZE),
    ]  # fmt: skip

    def linears(self) -> list[Linears]:
        """Return the linears in the order of `LayerParts.groups`."""
        return [self.qkv, self.o, self.gate_up, self.down]


class Step(ctypes.Structure):
    _fields_ = [
        ("rows", _SIZE), ("cos", _POINTER), ("sin", _POINTER), ("slots", _POINTER), ("work", _POINTER),
        ("num_work", _SIZE), ("tables", _POINTER), ("block_size", _SIZE), ("lora", LoRAView), ("threads", ctypes.c_int),
    ]  # fmt: skip


def layer_argument(parts: LayerParts) -> Layer | None:
    """Describe a layer; None if a linear's base is not a `NativeLinear`."""
    linears = [_linears(group) for group in parts.groups]
    if None in linears:
        return None
    norms: Any = parts.norms
    weights, epsilons = [norm.weight.data_ptr() for norm in norms], [norm.variance_epsilon for norm in norms]
    kv_heads = parts.groups[0].columns.sizes[1] // parts.head_dim
    return Layer(*linears, *weights, *epsilons, parts.scale, kv_heads, parts.head_dim, parts.window or 0)


def _linears(group: LoRAGroup) -> Linears | None:
    inner = group.base.inner if isinstance(group.base, StackedLinear) else group.base
    if type(inner) is not NativeLinear:
        return None
    a, b, sizes = group.columns
    bias = None if inner.bias is None else inner.bias.data_ptr()
    own = inner.packed.data_ptr(), bias, inner.in_features, inner.out_features
    return Linears(*own, a.data_ptr(), b.data_ptr(), a.shape[1], len(sizes), (_SIZE * 3)(*sizes))


def step_argument(
    batch: ForwardBatch, attention: NativeAttentionPlan, lora: LoRAView, cos: Tensor, sin: Tensor, block_size: int
) -> Step:
    """Describe a step. The tensors must outlive the description, which has their addresses."""
    return Step(
        len(batch.input_ids), cos.data_ptr(), sin.data_ptr(), batch.slot_mapping.data_ptr(), attention.work.data_ptr(),
        len(attention.work), attention.tables.data_ptr(), block_size, lora, torch.get_num_threads(),
    )  # fmt: skip

"""The specification, against which every implementation is tested. Here `delta` is a tensor like the input, or 0."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return (normed.float() * weight.float()).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: Tensor | float = 0
) -> tuple[Tensor, Tensor]:
    total = (residual.float() + (x.float() + delta)).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor, delta: Tensor | float = 0) -> Tensor:
    gate, up = (gate_up.float() + delta).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rope_kv_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, delta: Tensor | float = 0
) -> Tensor:
    kv_heads, head_dim = keys.shape[2:]
    heads = (qkv.float() + delta).view(len(qkv), -1, head_dim)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    kept = slots >= 0
    keys.flatten(0, 1)[slots[kept]] = rotated(key, cos, sin)[kept].to(keys.dtype)
    values.flatten(0, 1)[slots[kept]] = value[kept].to(values.dtype)
    return rotated(query, cos, sin).to(qkv.dtype)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    rotated = turned * cos.float()[:, None] + torch.cat([-high, low], -1) * sin.float()[:, None]
    return torch.cat([rotated, rest], -1)

"""The operations between a block's matrix products, each in one launch, and the choice of their implementation.

    rms_norm(x, weight, eps)                          x / sqrt(mean(x²) + eps) * weight
    add_rms_norm(x, residual, weight, eps, delta)     the same for h = residual + x + delta; returns the result and h
    silu_mul(gate_up, delta)                          silu(gate) * up
    rope_kv_write(qkv, cos, sin, keys, values, slots, delta)
                                                      rotated queries; rotated keys and values go to the paged cache

    x, residual  [rows, hidden]
    gate_up      [rows, 2 * intermediate], the gate first; the result is [rows, intermediate]
    qkv          [rows, (heads + 2 * kv_heads) * head_dim]; the result is [rows, heads, head_dim]
    cos, sin     [rows, rotary] with rotary <= head_dim, for pairs (d, d + rotary / 2) as in Llama and GPT-NeoX; the
                 dimensions beyond rotary are not rotated
    keys, values [blocks, block_size, kv_heads, head_dim], changed in place
    slots        [rows] int64; -1: the row's key and value are not stored

Rows may be strided, but are dense in themselves. Everything is computed in float32 and rounded once, h before it is
normalized. `delta` is the contribution of the step's adapters to the input: a `Delta` after the LoRA kernel's shrink,
expanded here and never written. A row without adapters is bit-identical to one computed without a delta.
"""

from types import ModuleType


def choose(device_type: str) -> tuple[ModuleType, str]:
    """Return the module of these functions for a device, and the reason as text for the log.

    cuda    Triton
    others  plain torch (the specification)
    """
    from server.model.fused import reference

    if device_type != "cuda":
        return reference, f"plain torch: there is no faster implementation for {device_type}"
    try:
        from server.model.fused import triton_fused
    except ImportError as error:
        return reference, f"plain torch: Triton cannot be imported ({error})"
    return triton_fused, "Triton kernels"

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

Rows may be strided, but are dense in themselves. Everything is computed in float32 and rounded once; a norm is rounded
once more before it is multiplied with its weight, as in the models, and h before it is normalized. `delta` is the
contribution of the step's adapters to the input: a `Delta` after the LoRA kernel's shrink, expanded here and never
written. A row without adapters is bit-identical to one computed without a delta.

reference.py specifies these functions, triton_fused.py implements them, and block_ops.py brings them into the model.
"""

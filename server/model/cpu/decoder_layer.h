// A whole decoder layer of Llama's structure, including the A and B of adapters.
#pragma once
#include <vector>

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "scale_shift.h"

namespace {

struct LoRA {  // `LoRAView` of adapters/kernels/cpu.py: all null without adapters
    void* (*prepare)(void* y, int64_t ldy, const void* x, int64_t ldx, const void* a, const void* b, int64_t in,
                     int64_t columns, const int64_t* sizes, int64_t linears, const void* segments, const float* scales,
                     int64_t count);
    void (*shrink)(void* call);
    void (*expand)(void* call);
    const void* segments;
    const float* scales;
    int64_t count;
};

struct Linears {  // stacked siblings over one input, with the rank columns of adapters
    const bf16 *packed, *bias;
    int64_t in, out;
    const void *a, *b;  // a: null if no adapter of the step changes these linears
    int64_t columns, siblings, sizes[3];
    const Vectors* inputs;  // of a single linear: what its weight is multiplied with; A sees the input as it is
    int64_t num_inputs;
    const Vectors* outputs;
    int64_t num_outputs;
};

struct Layer {
    Linears qkv, o, gate_up, down;
    const bf16 *attention_norm, *mlp_norm;
    float attention_eps, mlp_eps, scale;
    int64_t kv_heads, dim, window;
};

struct Step {
    int64_t rows;
    const bf16 *cos, *sin;
    const int64_t* slots;
    const Work* work;
    int64_t num_work;
    const int64_t* tables;
    int64_t block_size;
    LoRA lora;
    int threads;
};

// The adapters' A are read together with the base weights, which costs one more barrier instead of two.
void apply(bf16* y, const bf16* x, const Linears& l, const Step& s) {
    const LoRA& lora = s.lora;
    void* call = nullptr;
    if (lora.prepare && l.a)
        call = lora.prepare(y, l.out, x, l.in, l.a, l.b, l.in, l.columns, l.sizes, l.siblings, lora.segments,
                            lora.scales, lora.count);
    if (l.num_inputs) x = scaled_inputs(x, s.rows, l.in, l.inputs, l.num_inputs, s.threads);
    Inputs inputs(x, l.in, s.rows, l.in);
#pragma omp parallel num_threads(s.threads)
    {
        if (call) lora.shrink(call);
        linear(y, l.out, inputs, l.packed, l.bias, l.out);
        scale_shift(y, s.rows, l.out, l.outputs, l.num_outputs);
        if (call) lora.expand(call);
    }
}

// Every operation is computed as by the separate modules, so that the results are bit-identical.
void decoder_layer(bf16* to, const bf16* hidden, bf16* keys, bf16* values, const Layer& l, const Step& s) {
    static thread_local std::vector<bf16> scratch;
    int64_t rows = s.rows, size = l.qkv.in, attended = l.o.in, inner = l.down.in;
    scratch.resize(size_t(rows) * (2 * size + l.qkv.out + attended + 3 * inner));
    bf16 *normed = scratch.data(), *out = normed + rows * size, *qkv = out + rows * size;
    bf16 *heads = qkv + rows * l.qkv.out, *gate_up = heads + rows * attended, *product = gate_up + rows * 2 * inner;
    Shape shape{attended / l.dim, l.kv_heads, l.dim, s.block_size, l.window, l.scale, 0};

    rms_norm(normed, hidden, l.attention_norm, rows, size, l.attention_eps, s.threads);
    apply(qkv, normed, l.qkv, s);
    rope_attention(heads, qkv, l.qkv.out, s.cos, s.sin, keys, values, s.slots, rows, s.work, s.num_work, s.tables,
                   shape, s.threads);
    apply(out, heads, l.o, s);
    add(to, hidden, out, rows, size, s.threads);

    rms_norm(normed, to, l.mlp_norm, rows, size, l.mlp_eps, s.threads);
    apply(gate_up, normed, l.gate_up, s);
    silu_mul(product, gate_up, rows, inner, s.threads);
    apply(out, product, l.down, s);
    add(to, to, out, rows, size, s.threads);
}

}  // namespace

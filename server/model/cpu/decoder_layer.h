// A whole decoder layer of Llama's structure, including the A and B of adapters.
#pragma once
#include <vector>

#include "attention.h"
#include "linear.h"
#include "rows.h"

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

struct Vectors {  // of an adapter, for rows [start, end): channels [first, first + size) become scale * them + shift
    int64_t start, end, first, size;
    const float* scale_and_shift;  // [2, size]
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

void scale_shift_row(bf16* row, int64_t m, const Vectors* all, int64_t count) {
    for (const Vectors* v = all; v < all + count; v++) {
        if (m < v->start || m >= v->end) continue;
        bf16* y = row + v->first;
        for (int64_t i = 0; i < v->size; i += W) {
            int64_t some = std::min<int64_t>(W, v->size - i);
            vec scale = load(v->scale_and_shift + i, some), shift = load(v->scale_and_shift + v->size + i, some);
            store(y + i, fused(load(y + i, some), scale, shift), some);
        }
    }
}

// A copy of x [rows, in] whose rows are scaled, in memory of the calling thread until it asks again.
const bf16* scaled_inputs(const bf16* x, const Linears& l, const Step& s) {
    static thread_local std::vector<bf16> scratch;
    scratch.resize(size_t(s.rows) * l.in);
    bf16* copy = scratch.data();
#pragma omp parallel for schedule(static) num_threads(s.threads) if (s.rows > 4)
    for (int64_t m = 0; m < s.rows; m++) {
        std::memcpy(copy + m * l.in, x + m * l.in, size_t(l.in) * sizeof *x);
        scale_shift_row(copy + m * l.in, m, l.inputs, l.num_inputs);
    }
    return copy;
}

// The adapters' A are read together with the base weights, which costs one more barrier instead of two.
void apply(bf16* y, const bf16* x, const Linears& l, const Step& s) {
    const LoRA& lora = s.lora;
    void* call = nullptr;
    if (lora.prepare && l.a)
        call = lora.prepare(y, l.out, x, l.in, l.a, l.b, l.in, l.columns, l.sizes, l.siblings, lora.segments,
                            lora.scales, lora.count);
    Inputs inputs(l.num_inputs ? scaled_inputs(x, l, s) : x, l.in, s.rows, l.in);
#pragma omp parallel num_threads(s.threads)
    {
        if (call) lora.shrink(call);
        linear(y, l.out, inputs, l.packed, l.bias, l.out);
        if (l.num_outputs) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < s.rows; m++) scale_shift_row(y + m * l.out, m, l.outputs, l.num_outputs);
        }
        if (call) lora.expand(call);
    }
}

void add(bf16* to, const bf16* a, const bf16* b, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * size; i < (row + 1) * size; i += W) {
            int64_t width = std::min<int64_t>(W, (row + 1) * size - i);
            store(to + i, load(a + i, width) + load(b + i, width), width);
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

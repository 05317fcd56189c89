// Operations on single rows: SiLU·mul, norms, rotary embedding, argmax.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "vec.h"

namespace {

template <typename T>
void silu_mul_row(T* y, const T* gate, const T* up, int64_t dim) {
    // SiLU is rounded to T before the product, as two torch operations would.
    for (int64_t i = 0; i < dim; i += W) {
        int64_t width = std::min<int64_t>(W, dim - i);
        vec v = load(gate + i, width), silu = v / (exp_of(-v) + 1.0f);
        store(y + i, rounded<T>(silu) * load(up + i, width), width);
    }
}

template <typename T>
void rotate(T* head, const T* cos, const T* sin, int64_t half) {
    // x cos + rotate_half(x) sin, each product rounded to T, as transformers' apply_rotary_pos_emb
    for (int64_t i = 0; i < half; i += W) {
        int64_t width = std::min<int64_t>(W, half - i);
        vec lo = load(head + i, width), hi = load(head + half + i, width);
        vec a = rounded<T>(lo * load(cos + i, width)), b = rounded<T>(-hi * load(sin + i, width));
        vec c = rounded<T>(hi * load(cos + half + i, width)), d = rounded<T>(lo * load(sin + half + i, width));
        store(head + i, a + b, width);
        store(head + half + i, c + d, width);
    }
}

// The sum in the order of torch's reduction over one contiguous dimension (ATen's SumKernel.cpp: four chains of eight
// lanes, folded after every 16, 256 and 4096 additions). A norm is then bit-identical to the model's own, and a tie of
// two tokens is decided the same way.
float sum_as_torch(const float* x, int64_t size) {
    typedef float octet __attribute__((vector_size(32)));
    constexpr int64_t CHAINS = 4, LEVELS = 4, STEP = 16;
    octet acc[LEVELS][CHAINS] = {};
    auto add = [&](int64_t from, int64_t chain) {
        octet v;
        std::memcpy(&v, x + from * 8, sizeof v);
        acc[0][chain] += v;
    };
    int64_t vectors = size / 8, rounds = vectors / CHAINS, i = 0;
    while (i + STEP <= rounds) {
        for (int64_t end = i + STEP; i < end; i++)
            for (int64_t c = 0; c < CHAINS; c++) add(i * CHAINS + c, c);
        int64_t fold = STEP;
        for (int64_t level = 1; level < LEVELS; level++, fold *= STEP) {
            for (int64_t c = 0; c < CHAINS; c++) {
                acc[level][c] += acc[level - 1][c];
                acc[level - 1][c] = octet{};
            }
            if (i % (fold * STEP)) break;
        }
    }
    for (; i < rounds; i++)
        for (int64_t c = 0; c < CHAINS; c++) add(i * CHAINS + c, c);
    for (int64_t level = 1; level < LEVELS; level++)
        for (int64_t c = 0; c < CHAINS; c++) acc[0][c] += acc[level][c];
    for (int64_t v = rounds * CHAINS; v < vectors; v++) add(v, 0);
    for (int64_t c = 1; c < CHAINS; c++) acc[0][0] += acc[0][c];
    float total = 0;
    for (int64_t k = vectors * 8; k < size; k++) total += x[k];
    for (int lane = 0; lane < 8; lane++) total += acc[0][0][lane];
    return total;
}

// The normalised row is rounded to T before the product with the weight. `scratch` has room for two rows.
template <typename T>
void rms_norm_row(T* y, const T* x, const T* weight, int64_t dim, float eps, float* scratch) {
    float *wide = scratch, *squares = scratch + dim;  // in memory, so that no square is fused with its addition
    for (int64_t i = 0; i < dim; i += W) {
        int64_t width = std::min<int64_t>(W, dim - i);
        vec v = load(x + i, width);
        store(wide + i, v, width);
        store(squares + i, v * v, width);
    }
    float scale = 1.0f / std::sqrt(sum_as_torch(squares, dim) / float(dim) + eps);
    for (int64_t i = 0; i < dim; i += W) {
        int64_t width = std::min<int64_t>(W, dim - i);
        store(y + i, rounded<T>(load(wide + i, width) * scale) * load(weight + i, width), width);
    }
}

template <typename T>
void silu_mul(T* y, const T* gate_up, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t m = 0; m < rows; m++)
        silu_mul_row(y + m * dim, gate_up + 2 * m * dim, gate_up + (2 * m + 1) * dim, dim);
}

template <typename T>
void rms_norm(T* y, const T* x, const T* weight, int64_t rows, int64_t dim, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        static thread_local std::vector<float> scratch;
        scratch.resize(size_t(2 * dim));
        rms_norm_row(y + row * dim, x + row * dim, weight, dim, eps, scratch.data());
    }
}

template <typename T>
void add(T* to, const T* a, const T* b, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * size; i < (row + 1) * size; i += W) {
            int64_t width = std::min<int64_t>(W, (row + 1) * size - i);
            store(to + i, load(a + i, width) + load(b + i, width), width);
        }
}

// The index of the first of the largest numbers; -1 if one is not finite. Only one block is searched for the index.
template <typename T>
int64_t argmax_row(const T* x, int64_t size) {
    constexpr int64_t BLOCK = 64 * W;
    float best = -INFINITY;
    int64_t from = 0;
    vec bad{};
    for (int64_t block = 0; block < size; block += BLOCK) {
        vec top = all(-INFINITY);
        int64_t end = std::min(size, block + BLOCK), i = block;
        for (; i + W <= end; i += W) {
            vec v = load(x + i);
            bad += v - v;
            top = v > top ? v : top;
        }
        float lanes[W], highest = -INFINITY;
        store(lanes, top, W);
        for (float lane : lanes) highest = std::max(highest, lane);
        for (; i < end; i++) {
            float v = to_float(x[i]);
            bad[0] += v - v;
            highest = std::max(highest, v);
        }
        if (highest > best) best = highest, from = block;
    }
    if (sum(bad) != 0) return -1;
    while (to_float(x[from]) != best) from++;
    return from;
}

template <typename T>
void argmax(int64_t* out, const T* x, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) out[row] = argmax_row(x + row * size, size);
}

struct Strengths {
    float repetition, frequency, presence;
};

// counts[token] is twice its occurrences in the output, plus 1 if the prompt has it. Most are 0.
inline void penalize_row(float* logits, const int32_t* counts, int64_t vocab, Strengths by) {
    for (int64_t token = 0; token < vocab; token++) {
        if (!counts[token]) continue;
        float value = logits[token] > 0 ? logits[token] / by.repetition : logits[token] * by.repetition;
        float outputs = counts[token] / 2;
        logits[token] = outputs > 0 ? value - (by.frequency * outputs + by.presence) : value;
    }
}

}  // namespace

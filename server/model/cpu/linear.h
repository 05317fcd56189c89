// bf16 linears for processors without bf16 arithmetic: weights are widened in registers.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"

namespace {

constexpr int PANEL = 16;  // outputs whose weights lie together: packed [out / 16][in][16]
constexpr int PARTS = PANEL / W;
constexpr int ROWS = 6;

// y[M rows][P panels of outputs] = x . panels; every output sums over k in order, whatever M and P are
template <int M, int P>
inline void tile(const float* x, int64_t in, const bf16* panels, vec (&acc)[M][P * PARTS]) {
    for (auto& row : acc)
        for (auto& part : row) part = vec{};
    for (int64_t k = 0; k < in; k++) {
        vec w[P * PARTS];
        for (int p = 0; p < P; p++)
            for (int i = 0; i < PARTS; i++) w[p * PARTS + i] = load(panels + (p * in + k) * PANEL + i * W);
        // Weights are read once a step: ahead of their use, and past the caches, where the rest of the step lives.
        for (int p = 0; p < P; p++) __builtin_prefetch(panels + (p * in + k) * PANEL + 1024, 0, 0);
        for (int m = 0; m < M; m++) {
            vec value = all(x[m * in + k]);
            for (int i = 0; i < P * PARTS; i++) acc[m][i] += value * w[i];
        }
    }
}

template <int M, int P>
void linear_tile(bf16* y, int64_t ldy, const float* x, int64_t in, const bf16* panels, const bf16* bias, int64_t n,
                 int64_t out) {
    vec acc[M][P * PARTS];
    tile<M, P>(x, in, panels, acc);
    int64_t width = std::min<int64_t>(P * PANEL, out - n);
    for (int m = 0; m < M; m++) {
        float row[P * PANEL];
        std::memcpy(row, acc[m], sizeof row);
        for (int64_t i = 0; i < width; i++) store(&y[m * ldy + n + i], bias ? row[i] + to_float(bias[n + i]) : row[i]);
    }
}

// Few rows take two panels at a time: one alone would wait for its own sums.
void linear_rows(bf16* y, int64_t ldy, const float* x, int64_t in, const bf16* panels, const bf16* bias, int64_t n,
                 int64_t out, int64_t rows, int64_t num_panels) {
    for (int64_t m = 0; m < rows; m += ROWS) {
        bf16* to = y + m * ldy;
        const float* from = x + m * in;
        int64_t left = std::min<int64_t>(rows - m, ROWS);
        if (left <= 2 && num_panels == 2) {
            if (left == 1) linear_tile<1, 2>(to, ldy, from, in, panels, bias, n, out);
            else linear_tile<2, 2>(to, ldy, from, in, panels, bias, n, out);
            continue;
        }
        for (int64_t p = 0; p < num_panels; p++) {
            const bf16* panel = panels + p * in * PANEL;
            int64_t first = n + p * PANEL;
            switch (left) {
                case 1: linear_tile<1, 1>(to, ldy, from, in, panel, bias, first, out); break;
                case 2: linear_tile<2, 1>(to, ldy, from, in, panel, bias, first, out); break;
                case 3: linear_tile<3, 1>(to, ldy, from, in, panel, bias, first, out); break;
                case 4: linear_tile<4, 1>(to, ldy, from, in, panel, bias, first, out); break;
                case 5: linear_tile<5, 1>(to, ldy, from, in, panel, bias, first, out); break;
                default: linear_tile<6, 1>(to, ldy, from, in, panel, bias, first, out);
            }
        }
    }
}

void linear(bf16* y, int64_t ldy, const bf16* x, int64_t ldx, const bf16* packed, const bf16* bias, int64_t rows,
            int64_t in, int64_t out, int threads) {
    static thread_local std::vector<float> scratch;
    scratch.resize(size_t(rows * in));
    float* wide = scratch.data();
    int64_t pairs = (out + 2 * PANEL - 1) / (2 * PANEL), panels = (out + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < in; k++) wide[m * in + k] = to_float(x[m * ldx + k]);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++)
            linear_rows(y, ldy, wide, in, packed + pair * 2 * in * PANEL, bias, pair * 2 * PANEL, out, rows,
                        std::min<int64_t>(2, panels - pair * 2));
    }
}

}  // namespace

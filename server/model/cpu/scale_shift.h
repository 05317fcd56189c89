// Scale and shift of rows, as of adapters with DoRA, trained biases or IA³ (adapters/runtime/scale_shift.py): computed in
// float32 and rounded once.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "vec.h"

namespace {

struct Vectors {  // of an adapter, for rows [start, end): channels [first, first + size) become scale * them + shift
    int64_t start, end, first, size;
    const float* scale_and_shift;  // [2, size]
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
const bf16* scaled_inputs(const bf16* x, int64_t rows, int64_t in, const Vectors* all, int64_t count, int threads) {
    static thread_local std::vector<bf16> scratch;
    scratch.resize(size_t(rows) * in);
    bf16* copy = scratch.data();
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t m = 0; m < rows; m++) {
        std::memcpy(copy + m * in, x + m * in, size_t(in) * sizeof *x);
        scale_shift_row(copy + m * in, m, all, count);
    }
    return copy;
}

// Changes y [rows, size] in place, by all threads of a parallel region.
void scale_shift(bf16* y, int64_t rows, int64_t size, const Vectors* all, int64_t count) {
    if (!count) return;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) scale_shift_row(y + m * size, m, all, count);
}

}  // namespace

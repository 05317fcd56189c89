// bf16 linears: with the matrix unit, with bf16 dot products, or with weights widened in registers, depending on the
// processor.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"
#ifdef __AMX_BF16__
#include "tiles.h"
#endif

namespace {

constexpr int PANEL = 32;  // outputs whose weights lie together: packed [out / 32][in / 2][32][2], padded with zeros
constexpr int DEPTH = 32;  // `in` is padded to a multiple of this
constexpr int ROWS = 6;

inline int64_t padded(int64_t in) { return (in + DEPTH - 1) / DEPTH * DEPTH; }

#ifdef __AVX512BF16__
typedef bf16 Input;
typedef __m512bh Pairs;  // for each output, the weights of two inputs
inline Pairs pairs(const bf16* from) { return (Pairs)_mm512_loadu_si512(from); }
inline void add_product(vec& sum, Pairs weights, const Input* x) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, weights, (__m512bh)_mm512_set1_epi32(both));
}
inline Input input(bf16 x) { return x; }
#else
typedef float Input;
struct Pairs { vec even, odd; };
inline Pairs pairs(const bf16* from) {
    typedef uint32_t uvec __attribute__((vector_size(W * 4)));
    uvec both;
    std::memcpy(&both, from, sizeof both);
    return {(vec)(both << 16), (vec)(both & 0xffff0000u)};
}
inline void add_product(vec& sum, const Pairs& weights, const Input* x) {
    add_product(sum, all(x[0]), weights.even);
    add_product(sum, all(x[1]), weights.odd);
}
inline Input input(bf16 x) { return to_float(x); }
#endif

// sums [M rows][PARTS * W] of x with as many outputs of a panel; every output sums over k in order, whatever M is
template <int M, int PARTS>
void sums_of(float* sums, const Input* x, int64_t ldx, int64_t depth, const bf16* panel) {
    vec acc[M][PARTS] = {};
    for (int64_t k = 0; k < depth; k += 2) {
        Pairs w[PARTS];
        for (int i = 0; i < PARTS; i++) w[i] = pairs(panel + k * PANEL + i * 2 * W);
        for (int i = 0; i < PARTS * 2 * W; i += LINE) prefetch(panel + k * PANEL + i + AHEAD);
        for (int m = 0; m < M; m++)
            for (int i = 0; i < PARTS; i++) add_product(acc[m][i], w[i], x + m * ldx + k);
    }
    for (int m = 0; m < M; m++) std::memcpy(sums + m * PANEL, acc[m], sizeof acc[m]);
}

template <int M>
void sums_of(float* sums, const Input* x, int64_t ldx, int64_t depth, const bf16* panel) {
    // As many as there are registers for; few would wait for their own sums.
    constexpr int PARTS = W == 16 || M <= 2 ? PANEL / W : PANEL / W / 2;
    for (int n = 0; n < PANEL; n += PARTS * W) sums_of<M, PARTS>(sums + n, x, ldx, depth, panel + n * 2);
}

void sums_of(float* sums, const Input* x, int64_t ldx, int64_t depth, const bf16* panel, int64_t rows) {
    switch (rows) {
        case 1: return sums_of<1>(sums, x, ldx, depth, panel);
        case 2: return sums_of<2>(sums, x, ldx, depth, panel);
        case 3: return sums_of<3>(sums, x, ldx, depth, panel);
        case 4: return sums_of<4>(sums, x, ldx, depth, panel);
        case 5: return sums_of<5>(sums, x, ldx, depth, panel);
        default: return sums_of<ROWS>(sums, x, ldx, depth, panel);
    }
}

void round_sums(bf16* y, int64_t ldy, const float* sums, const bf16* bias, int64_t rows, int64_t width) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < width; i += W) {
            int64_t some = std::min<int64_t>(W, width - i);
            vec sum = load(sums + m * PANEL + i);
            store_product(y + m * ldy + i, bias ? sum + load(bias + i, some) : sum, some);
        }
}

// Rows of the input, as they are multiplied: padded, and widened where that is done in registers.
struct Inputs {
    const bf16* given;
    int64_t given_stride, count, in, depth = padded(in);
    bool as_given = sizeof(Input) == sizeof(bf16) && in == depth;
    Input* own = as_given ? nullptr : room(count * depth);

    Inputs(const bf16* x, int64_t ldx, int64_t rows, int64_t in) : given(x), given_stride(ldx), count(rows), in(in) {}
    const Input* x() const { return as_given ? (const Input*)given : own; }
    int64_t ldx() const { return as_given ? given_stride : depth; }

    static Input* room(int64_t size) {  // the calling thread's, until it asks again
        static thread_local std::vector<Input> scratch;
        scratch.resize(size_t(size));
        return scratch.data();
    }
    void bring() const {  // by all threads of a parallel region
#pragma omp for schedule(static)
        for (int64_t m = 0; m < count; m++) {
            for (int64_t k = 0; k < in; k++) own[m * depth + k] = input(given[m * given_stride + k]);
            for (int64_t k = in; k < depth; k++) own[m * depth + k] = Input{};
        }
    }
};

#ifdef __AMX_BF16__
template <bool PREFETCH>
void tile_block(bf16* y, int64_t ldy, const Inputs& rows, int64_t first, const bf16* panel, const bf16* bias,
                int64_t width) {
    float sums[2 * TILE_ROWS * PANEL];
    int64_t some = std::min<int64_t>(2 * TILE_ROWS, rows.count - first);
    const bf16* x = rows.x() + first * rows.ldx();
    if (some > TILE_ROWS) tile_sums<true, PREFETCH>(sums, x, rows.ldx(), rows.depth, panel);
    else tile_sums<false, PREFETCH>(sums, x, rows.ldx(), rows.depth, panel);
    round_sums(y + first * ldy, ldy, sums, bias, some, width);
}

void tile_rows(bf16* y, int64_t ldy, const Inputs& rows, const bf16* panel, const bf16* bias, int64_t width) {
    constexpr int64_t BLOCK = 2 * TILE_ROWS;
    linear_tiles(std::min(rows.count, BLOCK)).configure();
    tile_block<true>(y, ldy, rows, 0, panel, bias, width);
    for (int64_t first = BLOCK; first < rows.count; first += BLOCK) {
        if (rows.count - first < BLOCK) linear_tiles(rows.count - first).configure();
        tile_block<false>(y, ldy, rows, first, panel, bias, width);
    }
    Tiles::release();
}
#endif

// y of all rows, for one panel of outputs
void linear_rows(bf16* y, int64_t ldy, const Inputs& rows, const bf16* panel, const bf16* bias, int64_t width) {
#ifdef __AMX_BF16__
    tile_rows(y, ldy, rows, panel, bias, width);
#else
    for (int64_t m = 0; m < rows.count; m += ROWS) {
        float sums[ROWS * PANEL];
        int64_t some = std::min<int64_t>(ROWS, rows.count - m);
        sums_of(sums, rows.x() + m * rows.ldx(), rows.ldx(), rows.depth, panel, some);
        round_sums(y + m * ldy, ldy, sums, bias, some, width);
    }
#endif
}

// By all threads of a parallel region.
void linear(bf16* y, int64_t ldy, const Inputs& inputs, const bf16* packed, const bf16* bias, int64_t out) {
    if (!inputs.as_given) inputs.bring();
#pragma omp for schedule(static)
    for (int64_t n = 0; n < out; n += PANEL)
        linear_rows(y + n, ldy, inputs, packed + n * inputs.depth, bias ? bias + n : nullptr,
                    std::min<int64_t>(PANEL, out - n));
}

}  // namespace

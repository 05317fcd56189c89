// bf16 products by the matrix unit of Intel's processors (AMX). The process has asked the kernel for its registers when it
// chose this form (adapters/device/forms.py).
#pragma once
#include <algorithm>

#include "vec.h"

namespace {

constexpr int TILE_ROWS = 16, TILE_DEPTH = 32, TILE_WIDTH = 16;

inline void written() { asm volatile("" ::: "memory"); }  // compilers do not see what tiles are loaded from

// The shapes of a thread's tiles, from `configure` to `release`.
struct Tiles {
    struct { uint8_t palette = 1, unused[15] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shapes;

    void shape(int tile, int64_t rows, int64_t bytes) {
        shapes.rows[tile] = uint8_t(rows);
        shapes.bytes[tile] = uint16_t(rows ? bytes : 0);
    }
    void configure() {
        written();
        _tile_loadconfig(&shapes);
    }
    static void release() { _tile_release(); }
};

// Tiles 0 to 3 are sums, 4 and 5 the rows of x, of which there are up to 32, 6 and 7 weights.
inline Tiles linear_tiles(int64_t rows) {
    Tiles tiles;
    for (int tile : {0, 1, 4}) tiles.shape(tile, std::min<int64_t>(rows, TILE_ROWS), 64);
    for (int tile : {2, 3, 5}) tiles.shape(tile, std::max<int64_t>(rows - TILE_ROWS, 0), 64);
    for (int tile : {6, 7}) tiles.shape(tile, TILE_DEPTH / 2, 64);
    return tiles;
}

// sums [rows][32] of x [rows, depth] with a panel of weights, in one order over k whatever the rows
template <bool LOWER, bool PREFETCH>
inline void tile_sums(float* sums, const bf16* x, int64_t ldx, int64_t depth, const bf16* panel) {
    constexpr int STRIDE = 2 * TILE_WIDTH * sizeof(float);
    written();
    _tile_zero(0);
    _tile_zero(1);
    if (LOWER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
        const bf16* weights = panel + k * 2 * TILE_WIDTH;
        for (int i = 0; PREFETCH && i < TILE_DEPTH * 2 * TILE_WIDTH; i += LINE) prefetch(weights + i + AHEAD);
        _tile_loadd(6, weights, 128);
        _tile_loadd(7, weights + 2 * TILE_WIDTH, 128);
        _tile_loadd(4, x + k, ldx * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (LOWER) {
            _tile_loadd(5, x + TILE_ROWS * ldx + k, ldx * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, sums + TILE_WIDTH, STRIDE);
    if (LOWER) {
        _tile_stored(2, sums + TILE_ROWS * 2 * TILE_WIDTH, STRIDE);
        _tile_stored(3, sums + TILE_ROWS * 2 * TILE_WIDTH + TILE_WIDTH, STRIDE);
    }
}

// products [4 * 16][n] of rows of 16, those of each of up to four `blocks` (null: none) `stride` apart, with n columns
// given as pairs [depth / 2][n][2]; tiles 0 to 3 are 16 by n, 4 is 16 by 32, 6 is 16 by n pairs
inline void tile_products(float* products, int64_t n, const bf16* const (&blocks)[4], int64_t stride, const bf16* pairs,
                          int64_t depth) {
    const int64_t bytes = n * 2 * int64_t(sizeof(bf16));
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += TILE_DEPTH) {
        _tile_loadd(6, pairs + d * n, bytes);
        if (blocks[0]) {
            _tile_loadd(4, blocks[0] + d, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
        }
        if (blocks[1]) {
            _tile_loadd(4, blocks[1] + d, stride * 2);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (blocks[2]) {
            _tile_loadd(4, blocks[2] + d, stride * 2);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (blocks[3]) {
            _tile_loadd(4, blocks[3] + d, stride * 2);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    const int64_t row = n * int64_t(sizeof(float));
    _tile_stored(0, products, row);
    _tile_stored(1, products + TILE_ROWS * n, row);
    _tile_stored(2, products + 2 * TILE_ROWS * n, row);
    _tile_stored(3, products + 3 * TILE_ROWS * n, row);
}

}  // namespace

// The arithmetic of the LoRA product: an item's rows times chunks of A's rank columns, and their sums times tiles of B.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace {

constexpr int ROWS = 4;    // of an item, at most
constexpr int CHUNK = 8;   // rank columns
constexpr int TILE = 192;  // maximum outputs of a tile, whose fp32 sums stay in the first-level cache

struct Segment { int64_t start, end, lo, hi; };
struct Item {
    const Segment* segment;
    float scale;
    int64_t row;
    int rows;
    int64_t place;  // offset of its products with A, [linears, rows, columns], in the buffer of all items

    int64_t columns() const { return segment->hi - segment->lo; }
    float* sums(float* all, int64_t linear) const { return all + place + linear * rows * columns(); }
};

template <typename T>
struct Linear {  // one of the siblings: its columns of y, its rank columns
    T* y; int64_t ldy;
    const T* x; int64_t ldx;
    const T* a; const T* b;
    int64_t in, out;
};

// v[row][column] = x[row] . a[column], for R rows and C columns, and prefetch `next`, which follows a
template <typename T, int R, int C>
void shrink(const T* x, int64_t ldx, const T* a, int64_t in, float* v, int64_t columns, const T* next) {
    constexpr int SIZE = Factors<T>::SIZE;
    vec sums[R][C] = {};
    auto add = [&](auto factors) {
        for (int r = 0; r < R; r++) {
            auto row = factors(x + r * ldx);
            for (int c = 0; c < C; c++) row.add_product(sums[r][c], factors(a + c * in));
        }
    };
    int64_t k = 0;
    for (; k + SIZE <= in; k += SIZE) {
        for (int c = 0; c < C; c++) prefetch(next + c * in + k);
        add([&](const T* of) { return Factors<T>(of + k); });
    }
    if (k < in) add([&](const T* of) { return Factors<T>(of + k, in - k); });
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) v[r * columns + c] = sum(sums[r][c]);
}

// Calls f(row, count) for all rows of an item, with as many rows at once as the registers hold
template <typename F>
void for_rows(const Item& item, F f) {
    constexpr int MOST = W == 16 ? 4 : 2;
    int r = 0;
    for (; r + MOST <= item.rows; r += MOST) f(r, std::integral_constant<int, MOST>());
    for (; r + 2 <= item.rows; r += 2) f(r, std::integral_constant<int, 2>());
    if (r < item.rows) f(r, std::integral_constant<int, 1>());
}

template <typename T, int C>
void shrink(const Item& item, const Linear<T>& l, int64_t column, float* v, const T* next) {
    int64_t columns = item.columns();
    const T *x = l.x + item.row * l.ldx, *a = l.a + (item.segment->lo + column) * l.in;
    for_rows(item, [&](int r, auto rows) {
        shrink<T, rows(), C>(x + r * l.ldx, l.ldx, a, l.in, v + r * columns + column, columns, next);
    });
}

template <typename T>
void shrink_chunk(const Item& item, const Linear<T>& l, int64_t from, float* v, const T* next) {
    int64_t columns = item.columns(), to = std::min(columns, from + CHUNK), c = from;
    for (; c + 4 <= to; c += 4) shrink<T, 4>(item, l, c, v, next + (c - from) * l.in);
    for (; c < to; c++) shrink<T, 1>(item, l, c, v, next + (c - from) * l.in);
    for (int r = 0; r < item.rows && item.scale != 1; r++)
        for (c = from; c < to; c++) v[r * columns + c] *= item.scale;
}

// sums[row] += v[row][column] * b[column] over `width` outputs, for R rows and C columns
template <typename T, int R, int C>
void expand(float* sums, const T* b, int64_t out, int64_t width, const float* v, int64_t columns, const T* next) {
    vec weights[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) weights[r][c] = all(v[r * columns + c]);
    auto add = [&](int64_t n, auto... some) {
        vec factors[C];
        for (int c = 0; c < C; c++) factors[c] = load(b + c * out + n, some...);
        for (int r = 0; r < R; r++) {
            vec total = load(sums + r * TILE + n);
            for (int c = 0; c < C; c++) add_product(total, factors[c], weights[r][c]);
            store(sums + r * TILE + n, total, W);
        }
    };
    int64_t n = 0;
    for (; n + W <= width; n += W) {
        if (n % LINE == 0)
            for (int c = 0; c < C; c++) prefetch(next + c * out + n);
        add(n);
    }
    if (n < width) add(n, width - n);
}

template <typename T, int C>
void expand(float* sums, const Item& item, const T* b, int64_t out, int64_t width, const float* v, const T* next) {
    int64_t columns = item.columns();
    for_rows(item, [&](int r, auto rows) {
        expand<T, rows(), C>(sums + r * TILE, b, out, width, v + r * columns, columns, next);
    });
}

// y[rows] += sum over columns of v[row][column] * b[column] for the outputs of a tile, of which there are `most` at most,
// and for `count` items of one row range. `all` has the products of all items with A.
template <typename T>
void expand_tile(const Item* items, int64_t count, const Linear<T>& l, int64_t linear, int64_t from, int64_t most,
                 float* all, const T* next) {
    int64_t width = std::min(most, l.out - from);
    int rows = items->rows;
    T* y = l.y + items->row * l.ldy + from;
    float sums[ROWS * TILE];
    for (int r = 0; r < rows; r++)
        for (int64_t n = 0; n < width; n += W)
            store(sums + r * TILE + n, load(y + r * l.ldy + n, std::min<int64_t>(W, width - n)), W);
    for (const Item* item = items; item < items + count; item++) {
        const T* b = l.b + item->segment->lo * l.out + from;
        const float* v = item->sums(all, linear);
        int64_t columns = item->columns(), c = 0;
        for (; c + 4 <= columns; c += 4)
            expand<T, 4>(sums, *item, b + c * l.out, l.out, width, v + c, next + c * l.out);
        for (; c < columns; c++) expand<T, 1>(sums, *item, b + c * l.out, l.out, width, v + c, next + c * l.out);
    }
    for (int r = 0; r < rows; r++)
        for (int64_t n = 0; n < width; n += W)
            store_product(y + r * l.ldy + n, load(sums + r * TILE + n), std::min<int64_t>(W, width - n));
}

}  // namespace

// Attention over the paged cache, prefill and decode in one call.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace {

struct Work {  // rows [row, row + rows) are neighbours of one sequence; the first of them sees `context` keys
    int64_t row, rows, context, table;  // where its block table begins in the list of all
};

struct Shape {
    int64_t heads, kv_heads, dim, block_size, window;  // window 0: all keys
    float scale, softcap;                              // softcap 0: none
};

constexpr int QUERIES = 8;

inline void add_weighted(vec& sum, vec value, float weight) {
    if (weight != 0) sum += value * weight;  // a key that is not seen may hold anything
}

// Up to QUERIES queries that share one key head, by the online softmax over blocks of keys.
// query i is q[i], sees keys [first(i), last[i]); out[i] gets its row.
template <typename T, int N>
void attend(const T* const* q, T* const* out, const int64_t* last, const T* keys, const T* values,
            const int64_t* table, int64_t kv_head, const Shape& s) {
    static thread_local std::vector<float> scratch;
    int64_t dim = s.dim, whole = dim / W * W, stride = s.kv_heads * dim;
    scratch.resize(size_t(N) * (dim * 2 + s.block_size));
    float *queries = scratch.data(), *sums = queries + N * dim, *scores = sums + N * dim;
    float largest[N], total[N] = {};
    int64_t end = 0, begin = last[0];
    for (int i = 0; i < N; i++) {
        for (int64_t d = 0; d < dim; d++) queries[i * dim + d] = to_float(q[i][d]) * s.scale;
        std::fill_n(sums + i * dim, dim, 0.0f);
        largest[i] = -INFINITY;
        end = std::max(end, last[i]);
        begin = std::min(begin, s.window ? std::max<int64_t>(0, last[i] - s.window) : 0);
    }
    for (int64_t block = begin / s.block_size; block * s.block_size < end; block++) {
        const T* k_block = keys + (table[block] * s.block_size * s.kv_heads + kv_head) * dim;
        const T* v_block = values + (table[block] * s.block_size * s.kv_heads + kv_head) * dim;
        int64_t first = block * s.block_size, used = std::min(s.block_size, end - first);
        for (int64_t j = 0; j < used; j++) {
            vec acc[N] = {};
            for (int64_t d = 0; d < whole; d += W) {
                vec key = load(k_block + j * stride + d);
                for (int i = 0; i < N; i++) acc[i] += load(queries + i * dim + d) * key;
            }
            if (whole < dim) {
                vec key = load(k_block + j * stride + whole, dim - whole);
                for (int i = 0; i < N; i++) acc[i] += load(queries + i * dim + whole, dim - whole) * key;
            }
            for (int i = 0; i < N; i++) {
                float score = sum(acc[i]);
                if (s.softcap) score = s.softcap * std::tanh(score / s.softcap);
                int64_t position = first + j;
                bool seen = position < last[i] && (!s.window || position >= last[i] - s.window);
                scores[i * s.block_size + j] = seen ? score : -INFINITY;
            }
        }
        for (int i = 0; i < N; i++) {
            float* own = &scores[i * s.block_size];
            float highest = largest[i];
            bool bad = false;  // a NaN must come through
            for (int64_t j = 0; j < used; j++) {
                highest = std::max(highest, own[j]);
                bad |= own[j] != own[j];
            }
            if (bad) total[i] = NAN;
            if (highest == -INFINITY) {
                std::fill(own, own + used, 0.0f);
                continue;
            }
            float correction = std::exp(largest[i] - highest);
            if (correction != 1)
                for (int64_t d = 0; d < dim; d++) sums[i * dim + d] *= correction;
            total[i] *= correction;
            for (int64_t j = 0; j < used; j += W) {
                float part[W];
                for (int l = 0; l < W; l++) part[l] = j + l < used ? own[j + l] - highest : -INFINITY;
                vec weights = exp_of(load(part));
                std::memcpy(part, &weights, sizeof part);
                for (int64_t l = 0; l < W && j + l < used; l++) {
                    own[j + l] = own[j + l] == -INFINITY ? 0 : part[l];
                    total[i] += own[j + l];
                }
            }
            largest[i] = highest;
        }
        for (int64_t d = 0; d < whole; d += W) {
            vec acc[N];
            for (int i = 0; i < N; i++) acc[i] = load(sums + i * dim + d);
            for (int64_t j = 0; j < used; j++) {
                vec value = load(v_block + j * stride + d);
                for (int i = 0; i < N; i++) add_weighted(acc[i], value, scores[i * s.block_size + j]);
            }
            for (int i = 0; i < N; i++) store(sums + i * dim + d, acc[i], W);
        }
        for (int64_t j = 0; j < used && whole < dim; j++) {
            vec value = load(v_block + j * stride + whole, dim - whole);
            for (int i = 0; i < N; i++) {
                vec acc = load(sums + i * dim + whole, dim - whole);
                add_weighted(acc, value, scores[i * s.block_size + j]);
                store(sums + i * dim + whole, acc, dim - whole);
            }
        }
    }
    for (int i = 0; i < N; i++)
        for (int64_t d = 0; d < dim; d++) store(&out[i][d], sums[i * dim + d] / total[i]);
}

template <typename T>
void attend(const T* const* q, T* const* out, const int64_t* last, int count, const T* keys, const T* values,
            const int64_t* table, int64_t kv_head, const Shape& s) {
    switch (count) {
        case 1: attend<T, 1>(q, out, last, keys, values, table, kv_head, s); break;
        case 2: attend<T, 2>(q, out, last, keys, values, table, kv_head, s); break;
        case 3: attend<T, 3>(q, out, last, keys, values, table, kv_head, s); break;
        case 4: attend<T, 4>(q, out, last, keys, values, table, kv_head, s); break;
        case 5: attend<T, 5>(q, out, last, keys, values, table, kv_head, s); break;
        case 6: attend<T, 6>(q, out, last, keys, values, table, kv_head, s); break;
        case 7: attend<T, 7>(q, out, last, keys, values, table, kv_head, s); break;
        default: attend<T, QUERIES>(q, out, last, keys, values, table, kv_head, s);
    }
}

// The next two share their work out among the threads of the parallel region that calls them.
template <typename T>
void attention(T* out, const T* q, int64_t q_row, int64_t q_head, const T* keys, const T* values, const Work* work,
               int64_t num_work, const int64_t* tables, const Shape& s) {
    int64_t group = s.heads / s.kv_heads;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_work * s.kv_heads; item++) {
        const Work& w = work[item / s.kv_heads];
        int64_t kv_head = item % s.kv_heads;
        const T* queries[QUERIES];
        T* outs[QUERIES];
        int64_t last[QUERIES];
        int count = 0;
        for (int64_t i = 0; i < w.rows * group; i++) {
            int64_t row = w.row + i / group, head = kv_head * group + i % group;
            queries[count] = q + row * q_row + head * q_head;
            outs[count] = out + (row * s.heads + head) * s.dim;
            last[count++] = w.context + i / group;
            if (count == QUERIES || i + 1 == w.rows * group) {
                attend(queries, outs, last, count, keys, values, tables + w.table, kv_head, s);
                count = 0;
            }
        }
    }
}

template <typename T>
void rope_write(T* qkv, int64_t ld, const T* cos, const T* sin, T* keys, T* values, const int64_t* slots, int64_t rows,
                const Shape& s) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* heads = qkv + row * ld;
        for (int64_t h = 0; h < s.heads + s.kv_heads; h++)
            rotate(heads + h * s.dim, cos + row * s.dim, sin + row * s.dim, s.dim / 2);
        if (slots[row] < 0) continue;
        size_t size = size_t(s.kv_heads * s.dim);
        std::memcpy(keys + slots[row] * size, heads + s.heads * s.dim, size * sizeof(T));
        std::memcpy(values + slots[row] * size, heads + (s.heads + s.kv_heads) * s.dim, size * sizeof(T));
    }
}

template <typename T>
void rope_attention(T* out, T* qkv, int64_t ld, const T* cos, const T* sin, T* keys, T* values, const int64_t* slots,
                    int64_t rows, const Work* work, int64_t num_work, const int64_t* tables, const Shape& s,
                    int threads) {
#pragma omp parallel num_threads(threads)
    {
        rope_write(qkv, ld, cos, sin, keys, values, slots, rows, s);
        attention(out, qkv, ld, s.dim, keys, values, work, num_work, tables, s);
    }
}

}  // namespace

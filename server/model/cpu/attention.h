// Attention over the paged cache, prefill and decode in one call: the work of the threads, divided into passes
// (attention_pass.h), whose sums the online softmax joins.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "attention_pass.h"

namespace {

struct Work {  // rows [row, row + rows) are neighbours of one sequence; the first of them sees `context` keys
    int64_t row, rows, context, table;  // table: start of its block table in the list of all
};

template <typename T, int N, typename Scores>
void attend(const Queries<T>& queries, const T* keys, const T* values, const int64_t* table, int64_t kv_head,
            const Shape& s) {
    static thread_local std::vector<float> scratch;
    constexpr int P = W == 16 ? (N <= 4 ? 4 : 2) : (N <= 2 ? 4 : N <= 4 ? 2 : 1);  // limited by the number of registers
    int64_t dim = s.dim, end = 0, begin = queries.last[0];
    scratch.resize(size_t(N * (dim + KEYS) + Scores::room(s)));
    float *sums = scratch.data(), *scores = sums + N * dim, corrections[N], largest[N];
    vec totals[N] = {};
    std::fill_n(sums, N * dim, 0.0f);
    std::fill_n(largest, N, -INFINITY);
    for (int i = 0; i < N; i++) {
        end = std::max(end, queries.last[i]);
        begin = std::min(begin, queries.first(i));
    }
    Scores score(scores + N * KEYS, queries, s);
    for (int64_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
        Pass<T> pass(start, begin, end, keys, values, table, kv_head, s);
        score(scores, pass);
        bool all_seen = true;
        for (int i = 0; i < N; i++) {
            float* own = scores + i * KEYS;
            int64_t from = std::clamp<int64_t>(queries.first(i) - start, 0, KEYS);
            int64_t to = std::clamp<int64_t>(queries.last[i] - start, from, KEYS);
            for (int64_t j = from; s.softcap && j < to; j++) own[j] = s.softcap * std::tanh(own[j] / s.softcap);
            std::fill(own, own + from, -INFINITY);
            std::fill(own + to, own + KEYS, -INFINITY);
            corrections[i] = softmax_pass(own, totals[i], largest[i]);
            all_seen &= from <= pass.from && to >= pass.to;
        }
        int64_t d = 0;
        for (; d + P * W <= dim; d += P * W) add_values<T, N, P>(sums, corrections, scores, pass, all_seen, dim, d);
        for (; d < dim; d += W) add_values<T, N, 1>(sums, corrections, scores, pass, all_seen, dim, d);
    }
    for (int i = 0; i < N; i++) {
        float total = sum(totals[i]);
        for (int64_t d = 0; d < dim; d += W) {
            int64_t width = std::min<int64_t>(W, dim - d);
            store(queries.out[i] + d, load(sums + i * dim + d, width) / total, width);
        }
    }
}

template <typename T, int N>
void attend(const Queries<T>& queries, const T* keys, const T* values, const int64_t* table, int64_t kv_head,
            const Shape& s) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, bf16>)
        if (TileScorer<N>::suits(s)) return attend<T, N, TileScorer<N>>(queries, keys, values, table, kv_head, s);
#endif
    attend<T, N, Scorer<T, N>>(queries, keys, values, table, kv_head, s);
}

template <typename T>
void attend(const Queries<T>& queries, int count, const T* keys, const T* values, const int64_t* table,
            int64_t kv_head, const Shape& s) {
    switch (count) {
        case 1: return attend<T, 1>(queries, keys, values, table, kv_head, s);
        case 2: return attend<T, 2>(queries, keys, values, table, kv_head, s);
        case 3: return attend<T, 3>(queries, keys, values, table, kv_head, s);
        case 4: return attend<T, 4>(queries, keys, values, table, kv_head, s);
        case 5: return attend<T, 5>(queries, keys, values, table, kv_head, s);
        case 6: return attend<T, 6>(queries, keys, values, table, kv_head, s);
        case 7: return attend<T, 7>(queries, keys, values, table, kv_head, s);
        default: return attend<T, QUERIES>(queries, keys, values, table, kv_head, s);
    }
}

// The next two divide their work among the threads of the calling parallel region.
template <typename T>
void attention(T* out, const T* q, int64_t q_row, int64_t q_head, const T* keys, const T* values, const Work* work,
               int64_t num_work, const int64_t* tables, const Shape& s) {
    int64_t group = s.heads / s.kv_heads;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_work * s.kv_heads; item++) {
        const Work& w = work[item / s.kv_heads];
        int64_t kv_head = item % s.kv_heads;
        Queries<T> queries;
        queries.window = s.window;
        int count = 0;
        for (int64_t i = 0; i < w.rows * group; i++) {
            int64_t row = w.row + i / group, head = kv_head * group + i % group;
            queries.q[count] = q + row * q_row + head * q_head;
            queries.out[count] = out + (row * s.heads + head) * s.dim;
            queries.last[count++] = w.context + i / group;
            if (count == QUERIES || i + 1 == w.rows * group) {
                attend(queries, count, keys, values, tables + w.table, kv_head, s);
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

// The arithmetic of attention in one pass: up to QUERIES queries of one sequence over KEYS positions of its context.
#pragma once
#include <algorithm>
#include <cmath>

#include "rows.h"
#ifdef __AMX_BF16__
#include "tiles.h"
#endif

namespace {

struct Shape {
    int64_t heads, kv_heads, dim, block_size, window;  // window 0: all keys
    float scale, softcap;                              // softcap 0: none
};

constexpr int QUERIES = 8;
constexpr int KEYS = 64;  // scored at once: positions [i * KEYS, (i + 1) * KEYS) for every query

template <typename T>
struct Queries {  // of one sequence, that share a key head; query i sees keys [first(i), last[i])
    const T* q[QUERIES];
    T* out[QUERIES];
    int64_t last[QUERIES], window;

    int64_t first(int i) const { return window ? std::max<int64_t>(0, last[i] - window) : 0; }
};

// The keys of one pass: lane j is position start + j; at least one query sees lanes [from, to)
template <typename T>
struct Pass {
    int64_t start, from, to;
    const T *keys[KEYS], *values[KEYS];

    Pass(int64_t start, int64_t begin, int64_t end, const T* all_keys, const T* all_values, const int64_t* table,
         int64_t kv_head, const Shape& s)
        : start(start), from(std::max<int64_t>(0, begin - start)), to(std::min<int64_t>(KEYS, end - start)) {
        for (int64_t j = from; j < to;) {
            int64_t block = (start + j) / s.block_size, within = start + j - block * s.block_size;
            int64_t place = ((table[block] * s.block_size + within) * s.kv_heads + kv_head) * s.dim;
            for (; within < s.block_size && j < to; within++, j++, place += s.kv_heads * s.dim) {
                keys[j] = all_keys + place;
                values[j] = all_values + place;
            }
        }
    }
};

// scores [N][KEYS] of lanes [from, to)
template <typename T, int N>
struct Scorer {
    static int64_t room(const Shape& s) { return N * s.dim; }

    const Shape& s;
    float* scaled;  // queries [N][dim]

    Scorer(float* room, const Queries<T>& queries, const Shape& s) : s(s), scaled(room) {
        for (int i = 0; i < N; i++)
            for (int64_t d = 0; d < s.dim; d++) scaled[i * s.dim + d] = to_float(queries.q[i][d]) * s.scale;
    }

    void operator()(float* scores, const Pass<T>& pass) const {
        for (int64_t j = pass.from; j < pass.to; j++) {
            vec sums[N] = {};
            for (int64_t d = 0; d < s.dim; d += W) {
                int64_t width = std::min<int64_t>(W, s.dim - d);
                vec key = load(pass.keys[j] + d, width);
                for (int i = 0; i < N; i++) add_product(sums[i], load(scaled + i * s.dim + d, width), key);
            }
            for (int i = 0; i < N; i++) scores[i * KEYS + j] = sum(sums[i]);
        }
    }
};

#ifdef __AMX_BF16__
template <int N>
struct TileScorer {  // the same with the matrix unit, sixteen neighboring keys per tile
    static bool suits(const Shape& s) { return s.dim % TILE_DEPTH == 0 && s.block_size % TILE_ROWS == 0; }
    static int64_t room(const Shape& s) { return N * s.dim / 2; }

    const Shape& s;
    bf16* pairs;  // queries [dim / 2][N][2]

    TileScorer(float* room, const Queries<bf16>& queries, const Shape& s) : s(s), pairs((bf16*)room) {
        for (int i = 0; i < N; i++)
            for (int64_t d = 0; d < s.dim; d++) pairs[(d / 2 * N + i) * 2 + d % 2] = queries.q[i][d];
        Tiles tiles;
        for (int sums : {0, 1, 2, 3}) tiles.shape(sums, TILE_ROWS, N * sizeof(float));
        tiles.shape(4, TILE_ROWS, 64);
        tiles.shape(6, TILE_DEPTH / 2, N * 2 * sizeof(bf16));
        tiles.configure();
    }
    ~TileScorer() { Tiles::release(); }

    void operator()(float* scores, const Pass<bf16>& pass) const {
        static_assert(KEYS == 4 * TILE_ROWS);
        float products[KEYS * N];
        const bf16* keys[4] = {};
        int64_t stride = s.kv_heads * s.dim;
        for (int64_t tile = pass.from / TILE_ROWS; tile * TILE_ROWS < pass.to; tile++) {
            int64_t lane = std::max(tile * TILE_ROWS, pass.from);  // blocks are whole in memory
            keys[tile] = pass.keys[lane] - (lane - tile * TILE_ROWS) * stride;
        }
        tile_products(products, N, keys, stride, pairs, s.dim);
        for (int i = 0; i < N; i++)
            for (int64_t j = pass.from; j < pass.to; j++) scores[i * KEYS + j] = products[j * N + i] * s.scale;
    }
};
#endif

// turns scores into weights and adds them to `totals`, lane by lane; returns the factor for all earlier sums (the online
// softmax)
inline float softmax_pass(float* scores, vec& totals, float& largest) {
    vec top = all(largest);
    for (int j = 0; j < KEYS; j += W) {
        vec v = load(scores + j);
        top = v > top ? v : top;  // a NaN propagates through its weight
    }
    float lanes[W], highest = largest;
    store(lanes, top, W);
    for (float lane : lanes) highest = std::max(highest, lane);
    float correction = highest == -INFINITY ? 1.0f : std::exp(largest - highest);
    totals *= correction;
    for (int j = 0; j < KEYS; j += W) {
        vec v = load(scores + j), weights = exp_of(v - highest);
        weights = v == all(-INFINITY) ? vec{} : weights;
        totals += weights;
        store(scores + j, weights, W);
    }
    largest = highest;
    return correction;
}

// sums [N][dim] times corrections, and the values of lanes [from, to) times weights [N][KEYS], for P registers of
// outputs from d on. Unless all keys are seen, an unseen key may contain anything.
template <typename T, int N, int P>
void add_values(float* sums, const float* corrections, const float* weights, const Pass<T>& pass, bool all_seen,
                int64_t dim, int64_t d) {
    vec acc[N][P];
    int64_t last = std::min<int64_t>(W, dim - d - (P - 1) * W);  // numbers of the last register
    auto width = [&](int p) { return p + 1 < P ? W : last; };
    for (int i = 0; i < N; i++)
        for (int p = 0; p < P; p++) acc[i][p] = load(sums + i * dim + d + p * W, width(p)) * corrections[i];
    for (int64_t j = pass.from; j < pass.to; j++) {
        vec value[P];
        for (int p = 0; p < P; p++) value[p] = load(pass.values[j] + d + p * W, width(p));
        for (int i = 0; i < N; i++) {
            float weight = weights[i * KEYS + j];
            if (!all_seen && weight == 0) continue;
            for (int p = 0; p < P; p++) add_product(acc[i][p], value[p], all(weight));
        }
    }
    for (int i = 0; i < N; i++)
        for (int p = 0; p < P; p++) store(sums + i * dim + d + p * W, acc[i][p], width(p));
}

}  // namespace

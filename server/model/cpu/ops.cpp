// What a decoder block does besides LoRA, on a CPU: bf16 linears where the processor has no bf16 arithmetic,
// SiLU·mul, rotary embedding, and attention over the paged cache.
//
// Plain C interface. Vectors are the compiler's (16 floats with AVX-512, 8 elsewhere); arithmetic is
// fp32 throughout and results are rounded once. No sum depends on how many rows or sequences are in the batch, or on the
// number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4)));

inline vec load(const float* from) {
    vec out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
// Compilers do not find the best instructions for these two.
#if defined(__AVX512F__)
inline vec all(float value) { return (vec)_mm512_set1_ps(value); }
inline vec load(const bf16* from) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
#elif defined(__AVX2__)
inline vec all(float value) { return (vec)_mm256_set1_ps(value); }
inline vec load(const bf16* from) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
#else
inline vec all(float value) { return vec{} + value; }
inline vec load(const bf16* from) {
    typedef uint32_t uvec __attribute__((vector_size(W * 4)));
    typedef uint16_t hvec __attribute__((vector_size(W * 2)));
    hvec narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    return (vec)(__builtin_convertvector(narrow, uvec) << 16);
}
#endif
inline float sum(vec v) {
    typedef float quad __attribute__((vector_size(16)));
    quad parts[W / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int step = W / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// -- linear -------------------------------------------------------------------------------------------------------

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

// -- rows ---------------------------------------------------------------------------------------------------------

// exp to within some 2 ulp: 2^n by the exponent's bits, 2^f by a polynomial (Cephes' expf).
inline vec exp_of(vec x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    vec n = x * 1.44269504088896341f;
    typedef int32_t ivec __attribute__((vector_size(W * 4)));
    ivec whole = __builtin_convertvector(n + (n < vec{} ? all(-0.5f) : all(0.5f)), ivec);
    vec f = __builtin_convertvector(whole, vec);
    x -= f * 0.693359375f;
    x -= f * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    ivec bits = (whole + 127) << 23;
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

using ::store;
inline vec load(const float* from, int64_t width) {  // the first `width` <= W of them, zeros beyond
    if (width == W) return load(from);
    float lanes[W] = {};
    std::memcpy(lanes, from, size_t(width) * sizeof(float));
    return load(lanes);
}
inline vec load(const bf16* from, int64_t width) {
    if (width == W) return load(from);
    bf16 lanes[W] = {};
    std::memcpy(lanes, from, size_t(width) * sizeof(bf16));
    return load(lanes);
}
inline void store(float* to, vec value, int64_t width) { std::memcpy(to, &value, size_t(width) * sizeof(float)); }
inline void store(bf16* to, vec value, int64_t width) {  // as `store` of bf16.h
    typedef uint32_t uvec __attribute__((vector_size(W * 4)));
    typedef uint16_t hvec __attribute__((vector_size(W * 2)));
    uvec wide;
    std::memcpy(&wide, &value, sizeof wide);
    uvec rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16, finite = (uvec)(value == value);
    hvec narrow = __builtin_convertvector((rounded & finite) | (~finite & 0x7fc0u), hvec);
    std::memcpy(to, &narrow, size_t(width) * sizeof(bf16));
}
template <typename T>
inline vec rounded(vec value) {  // to T and back
    T lanes[W];
    store(lanes, value, W);
    return load(lanes);
}

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
// lanes, folded after every 16, 256 and 4096 additions). A norm then has the very bits of the model's own, and where two
// tokens tie, the tie is decided the same way.
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
void rms_norm(T* y, const T* x, const T* weight, int64_t rows, int64_t dim, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        static thread_local std::vector<float> scratch;
        scratch.resize(size_t(2 * dim));
        rms_norm_row(y + row * dim, x + row * dim, weight, dim, eps, scratch.data());
    }
}

// -- attention ----------------------------------------------------------------------------------------------------

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

}  // namespace

extern "C" {

// weight [out, in] to panels; `packed` has room for out rounded up to 16 rows, and is zero there.
void pack_bf16(uint16_t* packed, const uint16_t* weight, int64_t out, int64_t in, int unpack) {
    for (int64_t n = 0; n < out; n++)
        for (int64_t k = 0; k < in; k++) {
            int64_t place = (n / PANEL * in + k) * PANEL + n % PANEL;
            if (unpack) const_cast<uint16_t*>(weight)[n * in + k] = packed[place];
            else packed[place] = weight[n * in + k];
        }
}

// y [rows, out] = x [rows, in] packed' + bias, bf16, with row strides ldy and ldx
void linear_bf16(void* y, int64_t ldy, const void* x, int64_t ldx, const void* packed, const void* bias, int64_t rows,
                 int64_t in, int64_t out, int threads) {
    static thread_local std::vector<float> scratch;
    scratch.resize(size_t(rows * in));
    float* wide = scratch.data();
    int64_t pairs = (out + 2 * PANEL - 1) / (2 * PANEL), panels = (out + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < in; k++) wide[m * in + k] = to_float(((const bf16*)x)[m * ldx + k]);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++)
            linear_rows((bf16*)y, ldy, wide, in, (const bf16*)packed + pair * 2 * in * PANEL, (const bf16*)bias,
                        pair * 2 * PANEL, out, rows, std::min<int64_t>(2, panels - pair * 2));
    }
}

#define BOTH_TYPES(SUFFIX, T)                                                                                          \
    /* y [rows, dim] from gate_up [rows, 2 * dim] */                                                                   \
    void silu_mul_##SUFFIX(void* y, const void* gate_up, int64_t rows, int64_t dim, int threads) {                     \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (rows > 4)")                                \
        for (int64_t m = 0; m < rows; m++)                                                                             \
            silu_mul_row((T*)y + m * dim, (const T*)gate_up + 2 * m * dim, (const T*)gate_up + (2 * m + 1) * dim, dim);\
    }                                                                                                                  \
    /* y [rows, dim] from x [rows, dim] */                                                                             \
    void rms_norm_##SUFFIX(void* y, const void* x, const void* weight, int64_t rows, int64_t dim, float eps,           \
                           int threads) {                                                                              \
        rms_norm((T*)y, (const T*)x, (const T*)weight, rows, dim, eps, threads);                                       \
    }                                                                                                                  \
    /* out [rows, heads, dim]; a head of a query is at q + row * q_row + head * q_head */                              \
    void attention_##SUFFIX(void* out, const void* q, int64_t q_row, int64_t q_head, const void* keys,                 \
                            const void* values, const void* work, int64_t num_work, const int64_t* tables,             \
                            int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size, int64_t window,          \
                            float scale, float softcap, int threads) {                                                 \
        Shape shape{heads, kv_heads, dim, block_size, window, scale, softcap};                                         \
        _Pragma("omp parallel num_threads(threads)")                                                                   \
        attention((T*)out, (const T*)q, q_row, q_head, (const T*)keys, (const T*)values, (const Work*)work, num_work,  \
                  tables, shape);                                                                                      \
    }                                                                                                                  \
    /* rotates queries and keys of qkv [rows, (heads + 2 kv_heads) * dim] in place, writes keys and values to the cache\
       [slots, kv_heads, dim], and then does as `attention`; cos and sin are [rows, dim] */                            \
    void rope_attention_##SUFFIX(void* out, void* qkv, int64_t ld, const void* cos, const void* sin, void* keys,       \
                                 void* values, const int64_t* slots, int64_t rows, const void* work, int64_t num_work, \
                                 const int64_t* tables, int64_t heads, int64_t kv_heads, int64_t dim,                  \
                                 int64_t block_size, int64_t window, float scale, int threads) {                       \
        Shape shape{heads, kv_heads, dim, block_size, window, scale, 0};                                               \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            rope_write((T*)qkv, ld, (const T*)cos, (const T*)sin, (T*)keys, (T*)values, slots, rows, shape);           \
            attention((T*)out, (const T*)qkv, ld, dim, (const T*)keys, (const T*)values, (const Work*)work, num_work,  \
                      tables, shape);                                                                                  \
        }                                                                                                              \
    }

BOTH_TYPES(bf16, bf16)
BOTH_TYPES(f32, float)
}

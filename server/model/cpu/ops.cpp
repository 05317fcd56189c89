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
    float lanes[W], total = 0;
    std::memcpy(lanes, &v, sizeof v);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return total + lanes[0];
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

template <typename T>
void silu_mul_row(T* y, const T* gate, const T* up, int64_t dim) {
    // SiLU is rounded to T before the product, as two torch operations would.
    for (int64_t i = 0; i < dim; i += W) {
        float g[W] = {}, out[W];
        int64_t width = std::min<int64_t>(W, dim - i);
        for (int64_t j = 0; j < width; j++) g[j] = to_float(gate[i + j]);
        vec v = load(g), silu = v / (exp_of(-v) + 1.0f);
        std::memcpy(out, &silu, sizeof out);
        for (int64_t j = 0; j < width; j++) {
            T rounded;
            store(&rounded, out[j]);
            store(&y[i + j], to_float(rounded) * to_float(up[i + j]));
        }
    }
}

template <typename T>
void rotate(T* head, const T* cos, const T* sin, int64_t half) {
    // x cos + rotate_half(x) sin, each product rounded to T, as transformers' apply_rotary_pos_emb
    for (int64_t i = 0; i < half; i++) {
        float lo = to_float(head[i]), hi = to_float(head[half + i]);
        T a, b, c, d;
        store(&a, lo * to_float(cos[i]));
        store(&b, -hi * to_float(sin[i]));
        store(&c, hi * to_float(cos[half + i]));
        store(&d, lo * to_float(sin[half + i]));
        store(&head[i], to_float(a) + to_float(b));
        store(&head[half + i], to_float(c) + to_float(d));
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

// Up to QUERIES queries that share one key head, by the online softmax over blocks of keys.
// query i is q[i], sees keys [first(i), last[i]); out[i] gets its row.
template <typename T>
void attend(const T* const* q, T* const* out, const int64_t* last, int count, const T* keys, const T* values,
            const int64_t* table, int64_t kv_head, const Shape& s) {
    int64_t dim = s.dim, stride = s.kv_heads * dim;
    std::vector<float> scratch(size_t(count) * dim * 2 + dim);  // queries, sums, a key
    float *queries = scratch.data(), *sums = queries + count * dim, *key = sums + count * dim;
    float largest[QUERIES], total[QUERIES] = {};
    int64_t end = 0, begin = last[0];
    for (int i = 0; i < count; i++) {
        for (int64_t d = 0; d < dim; d++) queries[i * dim + d] = to_float(q[i][d]) * s.scale;
        largest[i] = -INFINITY;
        end = std::max(end, last[i]);
        begin = std::min(begin, s.window ? std::max<int64_t>(0, last[i] - s.window) : 0);
    }
    std::vector<float> scores(size_t(count) * s.block_size);
    for (int64_t block = begin / s.block_size; block * s.block_size < end; block++) {
        const T* k_block = keys + (table[block] * s.block_size * s.kv_heads + kv_head) * dim;
        const T* v_block = values + (table[block] * s.block_size * s.kv_heads + kv_head) * dim;
        int64_t first = block * s.block_size, used = std::min(s.block_size, end - first);
        for (int64_t j = 0; j < used; j++) {
            for (int64_t d = 0; d < dim; d++) key[d] = to_float(k_block[j * stride + d]);
            for (int i = 0; i < count; i++) {
                vec acc{};
                float rest = 0;
                int64_t d = 0;
                for (; d + W <= dim; d += W) acc += load(queries + i * dim + d) * load(key + d);
                for (; d < dim; d++) rest += queries[i * dim + d] * key[d];
                float score = sum(acc) + rest;
                if (s.softcap) score = s.softcap * std::tanh(score / s.softcap);
                int64_t position = first + j;
                bool seen = position < last[i] && (!s.window || position >= last[i] - s.window);
                scores[i * s.block_size + j] = seen ? score : -INFINITY;
            }
        }
        for (int i = 0; i < count; i++) {
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
        for (int64_t j = 0; j < used; j++)
            for (int i = 0; i < count; i++) {
                float weight = scores[i * s.block_size + j];
                if (weight == 0) continue;  // a key that is not seen may hold anything
                int64_t d = 0;
                for (; d + W <= dim; d += W) {
                    vec acc = load(sums + i * dim + d) + load(v_block + j * stride + d) * weight;
                    std::memcpy(sums + i * dim + d, &acc, sizeof acc);
                }
                for (; d < dim; d++) sums[i * dim + d] += to_float(v_block[j * stride + d]) * weight;
            }
    }
    for (int i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d++) store(&out[i][d], sums[i * dim + d] / total[i]);
}

template <typename T>
void attention(T* out, const T* q, int64_t q_row, int64_t q_head, const T* keys, const T* values, const Work* work,
               int64_t num_work, const int64_t* tables, const Shape& s, int threads) {
    int64_t group = s.heads / s.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (num_work * s.kv_heads > 1)
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
                const Shape& s, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
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
    /* rotates queries and keys of qkv [rows, (heads + 2 kv_heads) * dim] in place, and writes keys and values to the  \
       cache [slots, kv_heads, dim]; cos and sin are [rows, dim] */                                                    \
    void rope_write_##SUFFIX(void* qkv, int64_t ld, const void* cos, const void* sin, void* keys, void* values,        \
                             const int64_t* slots, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,         \
                             int threads) {                                                                            \
        Shape shape{heads, kv_heads, dim, 0, 0, 0, 0};                                                                 \
        rope_write((T*)qkv, ld, (const T*)cos, (const T*)sin, (T*)keys, (T*)values, slots, rows, shape, threads);      \
    }                                                                                                                  \
    /* out [rows, heads, dim]; a head of a query is at q + row * q_row + head * q_head */                              \
    void attention_##SUFFIX(void* out, const void* q, int64_t q_row, int64_t q_head, const void* keys,                 \
                            const void* values, const void* work, int64_t num_work, const int64_t* tables,             \
                            int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size, int64_t window,          \
                            float scale, float softcap, int threads) {                                                 \
        Shape shape{heads, kv_heads, dim, block_size, window, scale, softcap};                                         \
        attention((T*)out, (const T*)q, q_row, q_head, (const T*)keys, (const T*)values, (const Work*)work, num_work,  \
                  tables, shape, threads);                                                                             \
    }

BOTH_TYPES(bf16, bf16)
BOTH_TYPES(f32, float)
}

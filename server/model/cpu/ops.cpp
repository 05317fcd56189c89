// The operations of a decoder block on a CPU, as Python calls them; each is implemented in the header of its name.
//
// Plain C interface. Arithmetic is fp32 throughout and results are rounded once. No sum depends on how many rows or
// sequences are in the batch, or on the number of threads.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "decoder_layer.h"

extern "C" {

// the kernel's ids of the threads that run a parallel region of this size
void thread_ids(int64_t* ids, int threads) {
#pragma omp parallel num_threads(threads)
    ids[omp_get_thread_num()] = syscall(SYS_gettid);
}

// weight [out, in] to panels, and back; `packed` has room for both rounded up to 32, and is zero there.
void pack_bf16(uint16_t* packed, uint16_t* weight, int64_t out, int64_t in, int unpack) {
    for (int64_t n = 0; n < out; n++)
        for (int64_t k = 0; k < in; k++) {
            uint16_t& place = packed[(n / PANEL * padded(in) + k / 2 * 2) * PANEL + n % PANEL * 2 + k % 2];
            if (unpack) weight[n * in + k] = place;
            else place = weight[n * in + k];
        }
}

// y [rows, out] = x [rows, in] packed' + bias, bf16, with row strides ldy and ldx
void linear_bf16(void* y, int64_t ldy, const void* x, int64_t ldx, const void* packed, const void* bias, int64_t rows,
                 int64_t in, int64_t out, int threads) {
    Inputs inputs((const bf16*)x, ldx, rows, in);
#pragma omp parallel num_threads(threads)
    linear((bf16*)y, ldy, inputs, (const bf16*)packed, (const bf16*)bias, out);
}

// Writes the layer's output for hidden [rows, size] to `to`, of the same shape. keys and values are its cache.
void decoder_layer_bf16(void* to, const void* hidden, void* keys, void* values, const Layer* layer, const Step* step) {
    decoder_layer((bf16*)to, (const bf16*)hidden, (bf16*)keys, (bf16*)values, *layer, *step);
}

// Penalties for rows [n] of logits [*, vocab], in place; the rows slots [n] of counts [*, width] have their counts.
// strengths are three rows [n]: repetition, frequency, presence.
void penalize_f32(float* logits, int64_t vocab, const int32_t* counts, int64_t width, const int64_t* rows,
                  const int64_t* slots, const float* strengths, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 1)
    for (int64_t i = 0; i < n; i++)
        penalize_row(logits + rows[i] * vocab, counts + slots[i] * width, vocab,
                     {strengths[i], strengths[n + i], strengths[2 * n + i]});
}

#define BOTH_TYPES(SUFFIX, T)                                                                                          \
    /* y [rows, dim] from gate_up [rows, 2 * dim] */                                                                   \
    void silu_mul_##SUFFIX(void* y, const void* gate_up, int64_t rows, int64_t dim, int threads) {                     \
        silu_mul((T*)y, (const T*)gate_up, rows, dim, threads);                                                        \
    }                                                                                                                  \
    /* y [rows, dim] from x [rows, dim] */                                                                             \
    void rms_norm_##SUFFIX(void* y, const void* x, const void* weight, int64_t rows, int64_t dim, float eps,           \
                           int threads) {                                                                              \
        rms_norm((T*)y, (const T*)x, (const T*)weight, rows, dim, eps, threads);                                       \
    }                                                                                                                  \
    /* out [rows] from x [rows, size] */                                                                               \
    void argmax_##SUFFIX(int64_t* out, const void* x, int64_t rows, int64_t size, int threads) {                    \
        argmax(out, (const T*)x, rows, size, threads);                                                              \
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
        rope_attention((T*)out, (T*)qkv, ld, (const T*)cos, (const T*)sin, (T*)keys, (T*)values, slots, rows,          \
                       (const Work*)work, num_work, tables, shape, threads);                                           \
    }

BOTH_TYPES(bf16, bf16)
BOTH_TYPES(f32, float)
}

// Compiler vectors (16 floats with AVX-512, 8 with AVX2, 4 elsewhere), loaded from and stored to fp32 or bf16.
//
// Sources are compiled without contraction (-ffp-contract=off): products and sums are fused where `fused` is called and
// nowhere else. The compiler would fuse some of them and not others, and a row's bits would depend on the number of
// rows computed together.
#pragma once
#include <cstdint>
#include <cstring>

#include "bf16.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(W * 4)));

inline vec load(const float* from) {
    vec out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
// Intrinsics, because compilers do not find the best instructions for these two functions.
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
// a * b + c, rounded once where the processor has an instruction for it, and twice elsewhere.
#if defined(__AVX512F__)
inline vec fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
inline vec fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
inline vec fused(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
inline vec fused(vec a, vec b, vec c) { return a * b + c; }
#endif
inline void add_product(vec& sum, vec a, vec b) { sum = fused(a, b, sum); }
inline float sum(vec v) {
    typedef float quad __attribute__((vector_size(16)));
    quad parts[W / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int step = W / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

constexpr int LINE = 32;     // bf16 values in a cache line
constexpr int AHEAD = 4096;  // prefetch distance in bf16 values, for large data read once and in order
// Into the second-level cache: prefetchnta, which bypasses it, has a third of the bandwidth on Intel processors.
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// exp with an error of about 2 ulp: 2^n by the exponent's bits, 2^f by a polynomial (Cephes' expf).
inline vec exp_of(vec x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    vec n = x * 1.44269504088896341f;
    typedef int32_t ivec __attribute__((vector_size(W * 4)));
    ivec whole = __builtin_convertvector(n + (n < vec{} ? all(-0.5f) : all(0.5f)), ivec);
    vec f = __builtin_convertvector(whole, vec);
    x = fused(f, all(-0.693359375f), x);
    x = fused(f, all(2.12194440e-4f), x);
    vec p = all(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, x, all(coefficient));
    p = fused(p * x, x, x) + 1.0f;
    ivec bits = (whole + 127) << 23;
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

using ::store;
inline vec load(const float* from, int64_t width) {  // the first `width` <= W floats, then zeros
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
template <typename V, typename T>
inline void keep(T* to, const V& lanes, int64_t width) {  // a copy of constant size compiles to one instruction
    if (width == W) std::memcpy(to, &lanes, W * sizeof(T));
    else std::memcpy(to, &lanes, size_t(width) * sizeof(T));
}
inline void store(float* to, vec value, int64_t width) { keep(to, value, width); }
inline void store(bf16* to, vec value, int64_t width) {  // rounds as `store` of bf16.h does
    typedef uint32_t uvec __attribute__((vector_size(W * 4)));
    typedef uint16_t hvec __attribute__((vector_size(W * 2)));
    uvec wide;
    std::memcpy(&wide, &value, sizeof wide);
    uvec rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16, finite = (uvec)(value == value);
    keep(to, __builtin_convertvector((rounded & finite) | (~finite & 0x7fc0u), hvec), width);
}
// Like `store`, but numbers too small for a normal bf16 may become 0.
inline void store_product(bf16* to, vec value, int64_t width) {
#ifdef __AVX512BF16__
    keep(to, _mm512_cvtneps_pbh((__m512)value), width);
#else
    store(to, value, width);
#endif
}
inline void store_product(float* to, vec value, int64_t width) { store(to, value, width); }
template <typename T>
inline vec rounded(vec value) {  // to T and back
    T lanes[W];
    store(lanes, value, W);
    return load(lanes);
}

// The values of a row of T that one instruction multiplies: two bf16 per lane where the processor supports it.
template <typename T>
struct Factors {
    static constexpr int SIZE = W;
    vec lanes;
    explicit Factors(const T* from, int64_t width = W) : lanes(load(from, width)) {}
    void add_product(vec& sum, const Factors& other) const { ::add_product(sum, lanes, other.lanes); }
};
#ifdef __AVX512BF16__
template <>
struct Factors<bf16> {
    static constexpr int SIZE = 2 * W;
    __m512bh lanes;
    explicit Factors(const bf16* from) : lanes((__m512bh)_mm512_loadu_si512(from)) {}
    Factors(const bf16* from, int64_t width) {
        if (width >= SIZE) width = SIZE;
        lanes = (__m512bh)_mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << width) - 1), from);
    }
    void add_product(vec& sum, const Factors& other) const {
        sum = (vec)_mm512_dpbf16_ps((__m512)sum, lanes, other.lanes);
    }
};
#endif

}  // namespace

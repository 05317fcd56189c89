// The LoRA product on a CPU, for segments of few rows and sibling linears over one input:
// y_l[rows] += scale * (x[rows] @ a[l, lo:hi].T) @ b_l[lo:hi].
//
// Plain C interface, plain loops: the compiler vectorises them for the machine it runs on (AVX-512, AVX2, NEON).
// Sums are fp32 throughout and y is rounded once per segment. A work item is up to ROWS rows of one segment, so that
// every rank column is read once for all of them; items of all linears are shared out among the OpenMP threads.
#include <cstdint>
#include <cstring>
#include <vector>

#include "bf16.h"

namespace {

constexpr int ROWS = 4;
constexpr int MAX_LINEARS = 3;
constexpr int TILE = 256;  // output columns whose fp32 sums stay in the first-level cache

struct Segment { int64_t start, end, lo, hi; };
struct Item { const Segment* segment; float scale; int64_t row; int rows; };

// v[row][column] = x[row] . a[column]: columns by fours, so that sums need not wait for each other
template <typename T, int N>
void shrink(const T* x, int64_t ldx, const T* a, int64_t columns, int64_t in, float* v) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        const T *c0 = a + c * in, *c1 = c0 + in, *c2 = c1 + in, *c3 = c2 + in;
        for (int r = 0; r < N; r++) {
            const T* row = x + r * ldx;
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t k = 0; k < in; k++) {
                float value = to_float(row[k]);
                s0 += value * to_float(c0[k]);
                s1 += value * to_float(c1[k]);
                s2 += value * to_float(c2[k]);
                s3 += value * to_float(c3[k]);
            }
            float* to = v + r * columns + c;
            to[0] = s0, to[1] = s1, to[2] = s2, to[3] = s3;
        }
    }
    for (; c < columns; c++)
        for (int r = 0; r < N; r++) {
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int64_t k = 0; k < in; k++) s += to_float(x[r * ldx + k]) * to_float(a[c * in + k]);
            v[r * columns + c] = s;
        }
}

// y[row] += sum over columns of v[row][column] * b[column]
template <typename T, int N>
void expand(T* y, int64_t ldy, const T* b, int64_t columns, int64_t out, const float* v) {
    for (int64_t n0 = 0; n0 < out; n0 += TILE) {
        int64_t width = out - n0 < TILE ? out - n0 : TILE, c = 0;
        float sum[N][TILE];
        for (int r = 0; r < N; r++)
            for (int64_t n = 0; n < width; n++) sum[r][n] = to_float(y[r * ldy + n0 + n]);
        for (; c + 4 <= columns; c += 4) {
            const T *c0 = b + c * out + n0, *c1 = c0 + out, *c2 = c1 + out, *c3 = c2 + out;
            for (int r = 0; r < N; r++) {
                const float* w = v + r * columns + c;
#pragma omp simd
                for (int64_t n = 0; n < width; n++)
                    sum[r][n] += w[0] * to_float(c0[n]) + w[1] * to_float(c1[n]) + w[2] * to_float(c2[n]) +
                                 w[3] * to_float(c3[n]);
            }
        }
        for (; c < columns; c++)
            for (int r = 0; r < N; r++) {
                float weight = v[r * columns + c];
#pragma omp simd
                for (int64_t n = 0; n < width; n++) sum[r][n] += weight * to_float(b[c * out + n0 + n]);
            }
        for (int r = 0; r < N; r++)
            for (int64_t n = 0; n < width; n++) store(&y[r * ldy + n0 + n], sum[r][n]);
    }
}

template <typename T>
struct Linear {  // one of the siblings: its columns of y, its rank columns
    T* y; int64_t ldy;
    const T* x; int64_t ldx;
    const T* a; const T* b;
    int64_t in, out;
};

template <typename T, int N>
void apply(const Item& item, const Linear<T>& l) {
    const Segment& s = *item.segment;
    int64_t columns = s.hi - s.lo;
    float v[ROWS * 1024];  // the caller bounds columns
    shrink<T, N>(l.x + item.row * l.ldx, l.ldx, l.a + s.lo * l.in, columns, l.in, v);
    if (item.scale != 1)
        for (int64_t i = 0; i < N * columns; i++) v[i] *= item.scale;
    expand<T, N>(l.y + item.row * l.ldy, l.ldy, l.b + s.lo * l.out, columns, l.out, v);
}

template <typename T>
void apply(const Item& item, const Linear<T>& l) {
    switch (item.rows) {
        case 1: apply<T, 1>(item, l); break;
        case 2: apply<T, 2>(item, l); break;
        case 3: apply<T, 3>(item, l); break;
        default: apply<T, 4>(item, l);
    }
}

template <typename T>
void run(T* y, int64_t ldy, const T* x, int64_t ldx, const T* a, const T* b, int64_t in, int64_t columns,
         const int64_t* sizes, int64_t num_linears, const Segment* segments, const float* scales, int64_t num_segments,
         int threads) {
    // Segments of one row range follow each other (their deltas add up), so a row range is never split between threads.
    static thread_local std::vector<Item> items;
    static thread_local std::vector<int64_t> offsets;
    items.clear();
    offsets.clear();
    for (int64_t i = 0; i < num_segments;) {
        int64_t next = i;
        while (next < num_segments && segments[next].start == segments[i].start) next++;
        for (int64_t row = segments[i].start; row < segments[i].end; row += ROWS) {
            offsets.push_back(int64_t(items.size()));
            for (int64_t j = i; j < next; j++) {
                int64_t left = segments[i].end - row;
                items.push_back(Item{&segments[j], scales ? scales[j] : 1, row, int(left < ROWS ? left : ROWS)});
            }
        }
        i = next;
    }
    int64_t groups = int64_t(offsets.size());
    offsets.push_back(int64_t(items.size()));
    Linear<T> linears[MAX_LINEARS];
    for (int64_t l = 0; l < num_linears; l++) {
        linears[l] = Linear<T>{y, ldy, x, ldx, a + l * columns * in, b, in, sizes[l]};
        y += sizes[l];
        b += columns * sizes[l];
    }
    const Item* shared_items = items.data();
    const int64_t* shared_offsets = offsets.data();
#pragma omp parallel for schedule(static) num_threads(threads) if (groups * num_linears > 1)
    for (int64_t i = 0; i < groups * num_linears; i++) {
        int64_t g = i / num_linears;
        for (int64_t j = shared_offsets[g]; j < shared_offsets[g + 1]; j++)
            apply(shared_items[j], linears[i % num_linears]);
    }
}

}  // namespace

// x [rows, in] and y [rows, sum of sizes] with row strides ldx and ldy, a [linears, columns, in], b the linears'
// [columns, size] one after the other, all of one type. At most 1024 columns a segment.
// `scales` are one to a segment, or null: all 1. Segments of the same rows are neighbours.
extern "C" void lora_add_bf16(void* y, int64_t ldy, const void* x, int64_t ldx, const void* a, const void* b, int64_t in,
                              int64_t columns, const int64_t* sizes, int64_t linears, const void* segments,
                              const float* scales, int64_t count, int threads) {
    run((bf16*)y, ldy, (const bf16*)x, ldx, (const bf16*)a, (const bf16*)b, in, columns, sizes, linears,
        (const Segment*)segments, scales, count, threads);
}

extern "C" void lora_add_f32(void* y, int64_t ldy, const void* x, int64_t ldx, const void* a, const void* b, int64_t in,
                             int64_t columns, const int64_t* sizes, int64_t linears, const void* segments,
                             const float* scales, int64_t count, int threads) {
    run((float*)y, ldy, (const float*)x, ldx, (const float*)a, (const float*)b, in, columns, sizes, linears,
        (const Segment*)segments, scales, count, threads);
}

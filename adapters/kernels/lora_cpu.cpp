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

// v[row][column] = x[row] . a[column], for R rows and four columns: a column is widened once for the rows, and no sum
// waits for another
template <typename T, int R>
void shrink_four(const T* x, int64_t ldx, const T* a, int64_t in, float* v, int64_t columns) {
    const T *c0 = a, *c1 = c0 + in, *c2 = c1 + in, *c3 = c2 + in, *other = x + (R - 1) * ldx;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, t0, t1, t2, t3)
    for (int64_t k = 0; k < in; k++) {
        float a0 = to_float(c0[k]), a1 = to_float(c1[k]), a2 = to_float(c2[k]), a3 = to_float(c3[k]);
        float value = to_float(x[k]);
        s0 += value * a0, s1 += value * a1, s2 += value * a2, s3 += value * a3;
        if (R == 2) {
            value = to_float(other[k]);
            t0 += value * a0, t1 += value * a1, t2 += value * a2, t3 += value * a3;
        }
    }
    v[0] = s0, v[1] = s1, v[2] = s2, v[3] = s3;
    if (R == 2) v += columns, v[0] = t0, v[1] = t1, v[2] = t2, v[3] = t3;
}

template <typename T, int N>
void shrink(const T* x, int64_t ldx, const T* a, int64_t columns, int64_t in, float* v) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        int r = 0;
        for (; r + 2 <= N; r += 2) shrink_four<T, 2>(x + r * ldx, ldx, a + c * in, in, v + r * columns + c, columns);
        if (r < N) shrink_four<T, 1>(x + r * ldx, ldx, a + c * in, in, v + r * columns + c, columns);
    }
    for (; c < columns; c++)
        for (int r = 0; r < N; r++) {
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int64_t k = 0; k < in; k++) s += to_float(x[r * ldx + k]) * to_float(a[c * in + k]);
            v[r * columns + c] = s;
        }
}

// sum[row] += v[row][column] * b[column] over `width` outputs, for R rows and four columns
template <typename T, int R>
void expand_four(float* sum, const T* b, int64_t out, int64_t width, const float* v, int64_t columns) {
    const T *c0 = b, *c1 = c0 + out, *c2 = c1 + out, *c3 = c2 + out;
    const float* u = v + (R - 1) * columns;
    float* other = sum + (R - 1) * TILE;
#pragma omp simd
    for (int64_t n = 0; n < width; n++) {
        float b0 = to_float(c0[n]), b1 = to_float(c1[n]), b2 = to_float(c2[n]), b3 = to_float(c3[n]);
        sum[n] += v[0] * b0 + v[1] * b1 + v[2] * b2 + v[3] * b3;
        if (R == 2) other[n] += u[0] * b0 + u[1] * b1 + u[2] * b2 + u[3] * b3;
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
            const T* four = b + c * out + n0;
            int r = 0;
            for (; r + 2 <= N; r += 2) expand_four<T, 2>(sum[r], four, out, width, v + r * columns + c, columns);
            if (r < N) expand_four<T, 1>(sum[r], four, out, width, v + r * columns + c, columns);
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

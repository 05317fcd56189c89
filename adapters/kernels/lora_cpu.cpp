// The LoRA product on a CPU, for segments of few rows and sibling linears over one input:
// y_l[rows] += scale * (x[rows] @ a[l, lo:hi].T) @ b_l[lo:hi].
//
// Plain C interface. Sums are fp32 throughout, and y is rounded once per row range. An item is up to ROWS rows of one
// segment, so that every rank column is read once for all of them. Items are shrunk in chunks of columns and expanded
// in tiles of outputs, both distributed over the OpenMP threads, so that one row keeps all threads busy. No sum depends
// on the split of the rows or on the number of threads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "lora_product.h"

namespace {

constexpr int MAX_LINEARS = 3;

struct Group { int64_t first, last; };  // items of one row range, whose products add up
struct Part { int64_t of, linear, from; };  // a chunk of an item, or a tile of a group

// The work of a call, divided into parts for the threads.
struct Cuts {
    std::vector<Item> items;
    std::vector<Group> groups;
    std::vector<Part> chunks, tiles;
    int64_t tile;  // outputs of a tile
    std::vector<float> v;
};

// Items of one row range are adjacent, and one thread expands a tile of their group.
void cut(Cuts& cuts, const Segment* segments, const float* scales, int64_t count, const int64_t* sizes,
         int64_t linears) {
    cuts.items.clear(), cuts.groups.clear(), cuts.chunks.clear(), cuts.tiles.clear();
    int64_t room = 0;
    for (int64_t i = 0, next; i < count; i = next) {
        for (next = i; next < count && segments[next].start == segments[i].start;) next++;
        for (int64_t row = segments[i].start; row < segments[i].end; row += ROWS) {
            int64_t rows = std::min<int64_t>(ROWS, segments[i].end - row), first = int64_t(cuts.items.size());
            for (int64_t j = i; j < next; j++) {
                int64_t columns = segments[j].hi - segments[j].lo, item = int64_t(cuts.items.size());
                cuts.items.push_back({&segments[j], scales ? scales[j] : 1, row, int(rows), room});
                room += linears * rows * columns;
                for (int64_t l = 0; l < linears; l++)
                    for (int64_t c = 0; c < columns; c += CHUNK) cuts.chunks.push_back({item, l, c});
            }
            cuts.groups.push_back({first, int64_t(cuts.items.size())});
        }
    }
    int64_t groups = int64_t(cuts.groups.size());
    cuts.tile = groups > 1 ? TILE : TILE / 2;  // with one group, a thread could get twice another's work
    for (int64_t group = 0; group < groups; group++)
        for (int64_t l = 0; l < linears; l++)
            for (int64_t n = 0; n < sizes[l]; n += cuts.tile) cuts.tiles.push_back({group, l, n});
    cuts.v.resize(size_t(room));
}

template <typename T>
struct Call {
    Linear<T> linears[MAX_LINEARS];
    Cuts cuts;  // kept so that the next call reuses its memory

    const T* columns_of(const Part& chunk) const {
        const Linear<T>& l = linears[chunk.linear];
        return l.a + (cuts.items[chunk.of].segment->lo + chunk.from) * l.in;
    }
    const T* outputs_of(const Part& tile) const {  // outputs of the first item of the tile's group
        const Linear<T>& l = linears[tile.linear];
        return l.b + cuts.items[cuts.groups[tile.of].first].segment->lo * l.out + tile.from;
    }
};

// Called by one thread; the same thread's next call overwrites the result.
template <typename T>
Call<T>& prepared(T* y, int64_t ldy, const T* x, int64_t ldx, const T* a, const T* b, int64_t in, int64_t columns,
                  const int64_t* sizes, int64_t num_linears, const Segment* segments, const float* scales,
                  int64_t count) {
    static thread_local Call<T> call;
    for (int64_t l = 0; l < num_linears; l++) {
        call.linears[l] = Linear<T>{y, ldy, x, ldx, a + l * columns * in, b, in, sizes[l]};
        y += sizes[l];
        b += columns * sizes[l];
    }
    cut(call.cuts, segments, scales, count, sizes, num_linears);
    return call;
}

// The two halves, each called by all threads of a parallel region, with a barrier between them.
template <typename T>
void shrink_all(Call<T>& call) {
    Cuts& cuts = call.cuts;
    int64_t count = int64_t(cuts.chunks.size());
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) {
        const Part &chunk = cuts.chunks[i], &next = cuts.chunks[std::min(i + 1, count - 1)];
        const Item& item = cuts.items[chunk.of];
        shrink_chunk(item, call.linears[chunk.linear], chunk.from, item.sums(cuts.v.data(), chunk.linear),
                     call.columns_of(next));
    }
}

template <typename T>
void expand_all(Call<T>& call) {
    Cuts& cuts = call.cuts;
    int64_t count = int64_t(cuts.tiles.size());
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) {
        const Part &tile = cuts.tiles[i], &next = cuts.tiles[std::min(i + 1, count - 1)];
        const Group& group = cuts.groups[tile.of];
        expand_tile(&cuts.items[size_t(group.first)], group.last - group.first, call.linears[tile.linear], tile.linear,
                    tile.from, cuts.tile, cuts.v.data(), call.outputs_of(next));
    }
}

template <typename T>
void run(Call<T>& call, int threads) {
#pragma omp parallel num_threads(threads) if (call.cuts.chunks.size() > 1)
    {
        shrink_all(call);
#pragma omp barrier
        expand_all(call);
    }
}

}  // namespace

// x [rows, in] and y [rows, sum of sizes] with row strides ldx and ldy, a [linears, columns, in], b the linears'
// [columns, size] one after the other, all of one type. `scales` has one scale per segment; null means all 1. Segments
// of the same rows are adjacent.
#define PARAMETERS                                                                                                   \
    void *y, int64_t ldy, const void *x, int64_t ldx, const void *a, const void *b, int64_t in, int64_t columns,     \
        const int64_t *sizes, int64_t linears, const void *segments, const float *scales, int64_t count
#define PREPARED(T)                                                                                                  \
    prepared((T*)y, ldy, (const T*)x, ldx, (const T*)a, (const T*)b, in, columns, sizes, linears,                    \
             (const Segment*)segments, scales, count)

extern "C" {
void lora_add_bf16(PARAMETERS, int threads) { run(PREPARED(bf16), threads); }
void lora_add_f32(PARAMETERS, int threads) { run(PREPARED(float), threads); }

// The same in separate steps, for C++ callers with other work in between: one thread prepares, then all threads of a
// parallel region shrink, wait at a barrier, and expand.
void* lora_prepare_bf16(PARAMETERS) { return &PREPARED(bf16); }
void lora_shrink_bf16(void* call) { shrink_all(*(Call<bf16>*)call); }
void lora_expand_bf16(void* call) { expand_all(*(Call<bf16>*)call); }
}

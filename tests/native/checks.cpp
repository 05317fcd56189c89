// Checks of the native code that need nothing but a C++ compiler, so that they also run where there is no Python: each
// operation against sums in double precision, and a row's bits beside neighbours against its bits alone.
//
// Build it with adapters/kernels/lora_cpu.cpp and server/model/cpu/ops.cpp; see tests/native/arm.sh. It prints a line for
// each check and exits with the number of those that failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

extern "C" {
void pack_bf16(uint16_t* packed, uint16_t* weight, int64_t out, int64_t in, int unpack);
void linear_bf16(void* y, int64_t ldy, const void* x, int64_t ldx, const void* packed, const void* bias, int64_t rows,
                 int64_t in, int64_t out, int threads);
#define DECLARED(SUFFIX)                                                                                               \
    void silu_mul_##SUFFIX(void* y, const void* gate_up, int64_t rows, int64_t dim, int threads);                      \
    void rms_norm_##SUFFIX(void* y, const void* x, const void* weight, int64_t rows, int64_t dim, float eps,           \
                           int threads);                                                                               \
    void argmax_##SUFFIX(int64_t* out, const void* x, int64_t rows, int64_t size, int threads);                     \
    void attention_##SUFFIX(void* out, const void* q, int64_t q_row, int64_t q_head, const void* keys,                 \
                            const void* values, const void* work, int64_t num_work, const int64_t* tables,             \
                            int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size, int64_t window,          \
                            float scale, float softcap, int threads);                                                  \
    void lora_add_##SUFFIX(void* y, int64_t ldy, const void* x, int64_t ldx, const void* a, const void* b, int64_t in, \
                           int64_t columns, const int64_t* sizes, int64_t linears, const void* segments,               \
                           const float* scales, int64_t count, int threads);
DECLARED(bf16)
DECLARED(f32)
}

namespace {

int failures = 0;

void report(const std::string& name, bool holds) {
    std::printf("%-60s %s\n", name.c_str(), holds ? "ok" : "FAILED");
    failures += !holds;
}

template <typename T> constexpr double STEP = sizeof(T) == 2 ? 1.0 / 128 : 1e-6;  // bf16 is a uint16_t here

double value(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
double value(float number) { return number; }

void put(float& to, float number) { to = number; }
void put(uint16_t& to, float number) {
    uint32_t wide;
    std::memcpy(&wide, &number, 4);
    to = uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

template <typename T>
std::vector<T> drawn(int seed, int64_t size, float scale = 1) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<T> all(size_t(size), T{});
    for (T& one : all) put(one, scale * normal(generator));
    return all;
}

template <typename T>
bool close(const std::vector<T>& found, const std::vector<double>& expected, double absolute) {
    for (size_t i = 0; i < found.size(); i++)
        if (!(std::abs(value(found[i]) - expected[i]) <= STEP<T> * std::abs(expected[i]) + absolute)) return false;
    return true;
}

template <typename T>
bool same(const T* a, const T* b, int64_t size) { return std::memcmp(a, b, size_t(size) * sizeof(T)) == 0; }

struct Cut { int64_t from, to; };
const Cut CUTS[] = {{0, 1}, {1, 3}, {3, 6}, {4, 8}, {2, 7}, {0, 6}, {10, 11}};
constexpr int64_t ROWS = 11;

void check_linear(int64_t in, int64_t out, int threads) {
    auto padded = [](int64_t size) { return (size + 31) / 32 * 32; };
    auto weight = drawn<uint16_t>(1, in * out), x = drawn<uint16_t>(2, ROWS * in), bias = drawn<uint16_t>(3, out);
    std::vector<uint16_t> packed(size_t(padded(in) * padded(out))), y(size_t(ROWS * out)), part(size_t(ROWS * out));
    pack_bf16(packed.data(), weight.data(), out, in, 0);
    linear_bf16(y.data(), out, x.data(), in, packed.data(), bias.data(), ROWS, in, out, threads);
    std::vector<double> expected;
    for (int64_t m = 0; m < ROWS; m++)
        for (int64_t n = 0; n < out; n++) {
            double total = value(bias[n]);
            for (int64_t k = 0; k < in; k++) total += value(x[m * in + k]) * value(weight[n * in + k]);
            expected.push_back(total);
        }
    std::string name = "linear " + std::to_string(in) + " to " + std::to_string(out);
    report(name, close(y, expected, 1e-3));
    bool alike = true;
    for (auto [from, to] : CUTS) {
        linear_bf16(part.data(), out, x.data() + from * in, in, packed.data(), bias.data(), to - from, in, out, 1);
        alike &= same(part.data(), y.data() + from * out, (to - from) * out);
    }
    report(name + ", rows alone and beside others", alike);
}

struct Segment { int64_t start, end, lo, hi; };

template <typename T, typename Add>
void check_lora(const std::string& type, Add add, int64_t in, int64_t rank) {
    const int64_t sizes[2] = {96, 50}, columns = 48, out = 146;
    auto x = drawn<T>(4, ROWS * in), y = drawn<T>(5, ROWS * out), a = drawn<T>(6, 2 * columns * in, 0.1f);
    auto b = drawn<T>(7, columns * out, 0.1f);
    Segment whole{0, ROWS, 5, 5 + rank};
    float scale = 0.7f;
    std::vector<double> expected;
    for (int64_t m = 0; m < ROWS; m++)
        for (int64_t l = 0, n = 0; l < 2; l++)
            for (int64_t i = 0; i < sizes[l]; i++, n++) {
                double total = value(y[m * out + n]);
                for (int64_t c = whole.lo; c < whole.hi; c++) {
                    double inner = 0;
                    for (int64_t k = 0; k < in; k++) inner += value(x[m * in + k]) * value(a[(l * columns + c) * in + k]);
                    total += scale * inner * value(b[(l ? columns * sizes[0] : 0) + c * sizes[l] + i]);
                }
                expected.push_back(total);
            }
    auto together = y;
    add(together.data(), out, x.data(), in, a.data(), b.data(), in, columns, sizes, 2, &whole, &scale, 1, 2);
    std::string name = "LoRA " + type + ", rank " + std::to_string(rank) + ", " + std::to_string(in) + " inputs";
    report(name, close(together, expected, sizeof(T) == 2 ? 2e-2 : 1e-4));
    bool alike = true;
    for (auto [from, to] : CUTS) {
        std::vector<T> part(y.begin() + from * out, y.begin() + to * out);
        Segment own{0, to - from, whole.lo, whole.hi};
        add(part.data(), out, x.data() + from * in, in, a.data(), b.data(), in, columns, sizes, 2, &own, &scale, 1, 1);
        alike &= same(part.data(), together.data() + from * out, (to - from) * out);
    }
    report(name + ", rows alone and beside others", alike);
}

template <typename T, typename Silu, typename Norm, typename Argmax>
void check_rows(const std::string& type, Silu silu_mul, Norm rms_norm, Argmax argmax, int64_t dim) {
    auto x = drawn<T>(8, ROWS * 2 * dim, 3), weight = drawn<T>(9, dim);
    std::vector<T> y(size_t(ROWS * dim));
    std::vector<double> expected;
    silu_mul(y.data(), x.data(), ROWS, dim, 2);
    for (int64_t m = 0; m < ROWS; m++)
        for (int64_t i = 0; i < dim; i++) {
            double gate = value(x[m * 2 * dim + i]);
            expected.push_back(gate / (1 + std::exp(-gate)) * value(x[(m * 2 + 1) * dim + i]));
        }
    report("SiLU·mul " + type + ", " + std::to_string(dim), close(y, expected, 2 * STEP<T>));
    expected.clear();
    rms_norm(y.data(), x.data(), weight.data(), ROWS, dim, 1e-5f, 2);
    for (int64_t m = 0; m < ROWS; m++) {
        double squares = 0;
        for (int64_t i = 0; i < dim; i++) squares += value(x[m * dim + i]) * value(x[m * dim + i]);
        for (int64_t i = 0; i < dim; i++)
            expected.push_back(value(x[m * dim + i]) / std::sqrt(squares / double(dim) + 1e-5) * value(weight[i]));
    }
    report("RMS norm " + type + ", " + std::to_string(dim), close(y, expected, 2 * STEP<T>));
    int64_t found[ROWS];
    argmax(found, x.data(), ROWS, dim, 2);
    bool right = true;
    for (int64_t m = 0; m < ROWS; m++) {
        int64_t best = 0;
        for (int64_t i = 1; i < dim; i++)
            if (value(x[m * dim + i]) > value(x[m * dim + best])) best = i;
        right &= found[m] == best;
    }
    report("argmax " + type + ", " + std::to_string(dim), right);
}

struct Work { int64_t row, rows, context, table; };

template <typename T, typename Attention>
void check_attention(const std::string& type, Attention attention, int64_t dim, int64_t window, float softcap) {
    const int64_t heads = 6, kv_heads = 2, block = 16, rows = 5, context = 90, blocks = 8;
    auto keys = drawn<T>(10, blocks * block * kv_heads * dim), values = drawn<T>(11, blocks * block * kv_heads * dim);
    auto q = drawn<T>(12, rows * heads * dim);
    const int64_t table[] = {5, 2, 7, 0, 3, 6};
    const float scale = 0.3f;
    std::vector<T> out(q.size()), alone(size_t(heads * dim));
    Work work{0, rows, context - rows + 1, 0};
    attention(out.data(), q.data(), heads * dim, dim, keys.data(), values.data(), &work, 1, table, heads, kv_heads, dim,
              block, window, scale, softcap, 2);
    std::vector<double> expected;
    bool alike = true;
    for (int64_t m = 0; m < rows; m++) {
        int64_t seen = work.context + m, first = window ? std::max<int64_t>(0, seen - window) : 0;
        for (int64_t h = 0; h < heads; h++) {
            std::vector<double> sums(size_t(dim), 0.0);
            double total = 0;
            auto at = [&](int64_t p) { return ((table[p / block] * block + p % block) * kv_heads + h / 3) * dim; };
            for (int64_t p = first; p < seen; p++) {
                double score = 0;
                for (int64_t d = 0; d < dim; d++) score += value(q[(m * heads + h) * dim + d]) * value(keys[at(p) + d]);
                score *= scale;
                double weight = std::exp(softcap != 0 ? softcap * std::tanh(score / softcap) : score);
                total += weight;
                for (int64_t d = 0; d < dim; d++) sums[d] += weight * value(values[at(p) + d]);
            }
            for (double sum : sums) expected.push_back(sum / total);
        }
        Work one{0, 1, seen, 0};
        attention(alone.data(), q.data() + m * heads * dim, heads * dim, dim, keys.data(), values.data(), &one, 1, table,
                  heads, kv_heads, dim, block, window, scale, softcap, 1);
        alike &= same(alone.data(), out.data() + m * heads * dim, heads * dim);
    }
    std::string name = "attention " + type + ", heads of " + std::to_string(dim) + ", window " + std::to_string(window);
    report(name, close(out, expected, sizeof(T) == 2 ? 1e-2 : 1e-5));
    report(name + ", rows alone and beside others", alike);
}

}  // namespace

int main() {
    for (int64_t in : {5, 33, 576})
        for (int64_t out : {7, 64, 200}) check_linear(in, out, 2);
    for (int64_t rank : {1, 8, 19})
        for (int64_t in : {77, 576}) {
            check_lora<uint16_t>("bf16", lora_add_bf16, in, rank);
            check_lora<float>("f32", lora_add_f32, in, rank);
        }
    for (int64_t dim : {7, 64, 577}) {
        check_rows<uint16_t>("bf16", silu_mul_bf16, rms_norm_bf16, argmax_bf16, dim);
        check_rows<float>("f32", silu_mul_f32, rms_norm_f32, argmax_f32, dim);
    }
    for (int64_t dim : {20, 64})
        for (int64_t window : {0, 33})
            for (float softcap : {0.0f, 2.0f}) {
                check_attention<uint16_t>("bf16", attention_bf16, dim, window, softcap);
                check_attention<float>("f32", attention_f32, dim, window, softcap);
            }
    std::printf("%d failed\n", failures);
    return failures;
}

// The kernels' representation of bf16: the upper half of a float's bits.
#pragma once
#include <cstdint>
#include <cstring>

struct bf16 { uint16_t bits; };

inline float to_float(bf16 value) {
    uint32_t wide = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline float to_float(float value) { return value; }

inline void store(bf16* to, float value) {  // round to nearest even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    to->bits = value == value ? uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}
inline void store(float* to, float value) { *to = value; }

// The Lloyd-Max levels of the standard normal distribution, as tables of bytes. One instruction
// looks up four of them.
#pragma once
#include "ptx.cuh"

namespace kvq {

// The same levels as in src/levels/lloyd_max.rs. A 3-bit code is an index in the first table. A
// 4-bit code is an index in the second table, with the sign in the highest bit.
template <int BITS>
__host__ __device__ constexpr float level_at(int place) {
    static_assert(BITS == 3 || BITS == 4);
    constexpr float three[8] = {-2.1503496f, -1.3431801f, -0.7556455f, -0.2449836f, 0.2449836f, 0.7556455f, 1.3431801f, 2.1503496f};
    constexpr float four[8] = {0.12842765f, 0.3881378f, 0.6568799f, 0.94244826f, 1.2562575f, 1.6178818f, 2.068447f, 2.7309222f};
    return BITS == 3 ? three[place] : four[place];
}

template <int BITS>
__device__ __forceinline__ float level(uint32_t code) {
    float x = level_at<BITS>(code % 8);
    return BITS == 4 && code >= 8 ? -x : x;
}

// Returns a number between 2^-14 and 2^16 as f16, rounded to nearest.
__host__ __device__ constexpr uint32_t f16_bits(float x) {
    uint32_t sign = x < 0 ? 0x8000 : 0;
    float y = x < 0 ? -x : x;
    int exponent = 15;
    for (; y >= 2; y /= 2) exponent++;
    for (; y < 1; y *= 2) exponent--;
    return sign | (exponent << 10) + uint32_t((y - 1) * 1024 + 0.5f);
}

// Returns byte `byte` of the levels `first` to `first` + 3.
template <int BITS>
__host__ __device__ constexpr uint32_t level_bytes(int first, int byte) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= (f16_bits(level_at<BITS>(first + i)) >> (8 * byte) & 0xff) << (8 * i);
    return bytes;
}

// Returns the levels of a word's 8 codes in pairs of columns: rows g and g + 8, then the same rows
// 8 columns to the right.
template <int BITS>
__device__ __forceinline__ void look_up(uint32_t (&a)[4], uint32_t word) {
    constexpr uint32_t LOW[2] = {level_bytes<BITS>(0, 0), level_bytes<BITS>(4, 0)}, HIGH[2] = {level_bytes<BITS>(0, 1), level_bytes<BITS>(4, 1)};
    const uint32_t places = BITS == 4 ? word & 0x77777777u : word;
    uint32_t pairs[2][2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        uint32_t low = permute(LOW[0], LOW[1], places >> 16 * e), high = permute(HIGH[0], HIGH[1], places >> 16 * e);
        pairs[e][0] = permute(low, high, 0x5140), pairs[e][1] = permute(low, high, 0x7362);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = permute(pairs[0][i / 2], pairs[1][i / 2], i % 2 ? 0x7632 : 0x5410);
        if constexpr (BITS == 4) a[i] |= word << (12 - 4 * i) & 0x80008000u;
    }
}

}  // namespace kvq

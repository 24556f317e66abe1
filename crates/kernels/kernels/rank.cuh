// The order of scores.
#pragma once
#include <cstdint>

// Returns a number that is larger for a better score, in the order of f32::total_cmp. NaN counts as
// -inf.
__device__ __forceinline__ uint32_t rank_of(float score) {
    const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Returns a number that is lower for a worse score, and for the newer of equal ones.
__device__ __forceinline__ unsigned long long place_of(float score, int entry) {
    return (unsigned long long)rank_of(score) << 32 | uint32_t(~entry);
}

// The order of entries by score and age.
#pragma once
#include <cstdint>

// Returns a number that is larger for a better score, in the order of f32::total_cmp. NaN counts as
// -inf. It is less than 2^32 - 1.
__device__ __forceinline__ uint32_t rank_of(float score) {
    const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Returns the position of an entry of a row: the first `placed` entries have listed positions, the
// others follow them without gaps.
template <typename Row>
__device__ __forceinline__ uint32_t position_of(const Row& row, int entry) {
    return entry < row.placed ? __ldg(row.positions + entry) : row.next + (entry - row.placed);
}

// Returns a number that is larger for a better entry, and for the older of equal ones. No two entries
// of a row have the same. Entries at the first and last positions are better than all others.
template <typename Row>
__device__ __forceinline__ uint64_t key_of(const Row& row, float score, uint32_t position) {
    const uint32_t end = row.next + (row.len - row.placed);
    const bool stays = position < uint32_t(row.sinks) || position >= end - row.recent;
    return uint64_t(stays ? ~0u : rank_of(score)) << 32 | ~position;
}

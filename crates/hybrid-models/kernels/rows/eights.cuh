// Loads and stores of eight neighbouring elements of a row.
#pragma once
#include "../neighbours.cuh"

namespace hybrid {

constexpr int EIGHT = 8;

// WHOLE: one access of 16 bytes or two. Otherwise the first `count` elements are loaded one by one,
// and the others are 0.
template <bool WHOLE, class T>
__device__ __forceinline__ void load(const T* from, int count, float (&to)[EIGHT]) {
    if (WHOLE) {
        load<T, EIGHT>(from, to);
    } else {
#pragma unroll
        for (int i = 0; i < EIGHT; i++) to[i] = i < count ? number(from[i]) : 0.f;
    }
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store(T* to, int count, const float (&from)[EIGHT]) {
    if (WHOLE) {
        store<T, EIGHT>(to, from);
    } else {
#pragma unroll
        for (int i = 0; i < EIGHT; i++) {
            if (i < count) to[i] = rounded<T>(from[i]);
        }
    }
}

// Returns whether an array (null or not) or a width allows accesses to eight elements at a time.
__device__ __forceinline__ bool in_eights(const void* array) { return (size_t)array % 16 == 0; }
__device__ __forceinline__ bool in_eights(int width) { return width % EIGHT == 0; }
template <class... All>
__device__ __forceinline__ bool all_in_eights(All... all) {
    return (in_eights(all) && ...);
}

// The channels of this thread in a one-dimensional grid: eight, or fewer at the end of a row.
struct RowPart {
    long long row;
    int c, count;
};
__device__ __forceinline__ RowPart row_part(int channels) {
    const int eights = (channels + EIGHT - 1) / EIGHT;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int c = int(thread % eights) * EIGHT;
    return {thread / eights, c, min(EIGHT, channels - c)};
}

}  // namespace hybrid

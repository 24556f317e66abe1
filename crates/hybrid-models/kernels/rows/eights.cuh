// Eight neighbours of a row at a time.
#pragma once
#include "../neighbours.cuh"

namespace hybrid {

constexpr int EIGHT = 8;

// WHOLE: in accesses of 16 bytes; otherwise the first `count` of them, one by one, and zeros for the rest.
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

// Whether arrays, null or not, and rows or parts of such widths can be read in eights.
__device__ __forceinline__ bool in_eights(const void* array) { return (size_t)array % 16 == 0; }
__device__ __forceinline__ bool in_eights(int width) { return width % EIGHT == 0; }
template <class... All>
__device__ __forceinline__ bool all_in_eights(All... all) {
    return (in_eights(all) && ...);
}

// The eight channels, or at the end of a row the last few, that are this thread's in a one-dimensional grid.
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

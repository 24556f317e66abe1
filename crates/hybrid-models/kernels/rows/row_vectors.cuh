// Loads and stores of eight adjacent elements of a row.
#pragma once
#include "../aligned_vector.cuh"

namespace hybrid {

constexpr int VECTOR = 8;

// WHOLE: one access of 16 bytes or two. Otherwise the first `count` elements are loaded one by one,
// and the others are 0.
template <bool WHOLE, class T>
__device__ __forceinline__ void load(const T* from, int count, float (&to)[VECTOR]) {
    if (WHOLE) {
        load<T, VECTOR>(from, to);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) to[i] = i < count ? number(from[i]) : 0.f;
    }
}

template <bool WHOLE, class T>
__device__ __forceinline__ void store(T* to, int count, const float (&from)[VECTOR]) {
    if (WHOLE) {
        store<T, VECTOR>(to, from);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            if (i < count) to[i] = rounded<T>(from[i]);
        }
    }
}

// Returns whether an array (null or not) or a width allows accesses to eight elements at a time.
__device__ __forceinline__ bool is_vectorizable(const void* array) { return (size_t)array % 16 == 0; }
__device__ __forceinline__ bool is_vectorizable(int width) { return width % VECTOR == 0; }
template <class... All>
__device__ __forceinline__ bool all_vectorizable(All... all) {
    return (is_vectorizable(all) && ...);
}

// The channels of this thread in a one-dimensional grid: eight, or fewer at the end of a row.
struct RowPart {
    long long row;
    int c, count;
};
__device__ __forceinline__ RowPart row_part(int channels) {
    const int vectors = (channels + VECTOR - 1) / VECTOR;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int c = int(thread % vectors) * VECTOR;
    return {thread / vectors, c, min(VECTOR, channels - c)};
}

}  // namespace hybrid

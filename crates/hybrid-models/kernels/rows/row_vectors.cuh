// Vectors of eight adjacent numbers of a row.
#pragma once
#include "../aligned_vector.cuh"

namespace hybrid {

constexpr int VECTOR = 8;

// WHOLE: in accesses of 16 bytes; otherwise the first `count` of them, one by one, and zeros for the rest.
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

// Whether arrays, null or not, and rows or parts of such widths can be read in vectors.
__device__ __forceinline__ bool is_vectorizable(const void* array) { return (size_t)array % 16 == 0; }
__device__ __forceinline__ bool is_vectorizable(int width) { return width % VECTOR == 0; }
template <class... All>
__device__ __forceinline__ bool all_vectorizable(All... all) {
    return (is_vectorizable(all) && ...);
}

// The channels of a vector, or at the end of a row the last few, that are this thread's in a one-dimensional grid.
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

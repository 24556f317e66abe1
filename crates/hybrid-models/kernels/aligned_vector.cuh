// Loads and stores of adjacent elements, with up to 16 bytes per access.
#pragma once
#include "number.cuh"

namespace hybrid {

template <class T, int N>
struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) AlignedVector {
    T x[N];
};
template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    const AlignedVector<T, N> all = *reinterpret_cast<const AlignedVector<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = number(all.x[i]);
}
template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    AlignedVector<T, N> all;
#pragma unroll
    for (int i = 0; i < N; i++) all.x[i] = rounded<T>(from[i]);
    *reinterpret_cast<AlignedVector<T, N>*>(to) = all;
}

}  // namespace hybrid

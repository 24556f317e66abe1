// Norms of whole rows, one thread block per row, each fused with the operation before it: the sum
// with a layer's output, or Mamba-2's gate.
#pragma once
#include "../args.cuh"
#include "row_vectors.cuh"

namespace hybrid {

constexpr int NORM_THREADS = 256, NORM_TILE = NORM_THREADS * VECTOR;

// Sums over the threads of the block. All threads get the sum.
__device__ __forceinline__ float sum_of_block(float x) {
    __shared__ float parts[NORM_THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) sum += parts[i];
    __syncthreads();
    return sum;
}

// y = (v - mean) / sqrt(mean of (v - mean)^2 + eps) o weight + bias. Without a bias, the mean is
// not subtracted. `value(c, count, v)` returns `count` elements of the row from c on. They are kept
// in 4 * width bytes of shared memory; each thread reads only those that it wrote.
template <bool WHOLE, class Y, class Value>
__device__ __forceinline__ void normalise(int width, float eps, const float* weight, const float* bias, Y* y, Value value) {
    extern __shared__ __align__(16) float norm_row[];
    float sum = 0, v[VECTOR];
    for (int c = threadIdx.x * VECTOR; c < width; c += NORM_TILE) {
        const int count = min(VECTOR, width - c);
        value(c, count, v);
        store<WHOLE>(norm_row + c, count, v);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum += bias ? v[i] : v[i] * v[i];
    }
    float mean = 0, square = sum_of_block(sum) / width;
    if (bias) {
        mean = square, sum = 0;
        for (int c = threadIdx.x * VECTOR; c < width; c += NORM_TILE) {
            const int count = min(VECTOR, width - c);
            load<WHOLE>(norm_row + c, count, v);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                if (WHOLE || i < count) sum = fmaf(v[i] - mean, v[i] - mean, sum);
            }
        }
        square = sum_of_block(sum) / width;
    }
    const float scale = rsqrtf(square + eps);
    float w[VECTOR], b[VECTOR] = {};
    for (int c = threadIdx.x * VECTOR; c < width; c += NORM_TILE) {
        const int count = min(VECTOR, width - c);
        load<WHOLE>(norm_row + c, count, v), load<WHOLE>(weight + c, count, w);
        if (bias) load<WHOLE>(bias + c, count, b);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] = fmaf((v[i] - mean) * scale, w[i], b[i]);
        store<WHOLE>(y + c, count, v);
    }
}

template <class T, class Y, bool WHOLE>
__device__ void norm_of(const Norm& p) {
    const long long row = (long long)blockIdx.x * p.channels;
    float* x = p.x + row;
    const T* added = p.added ? (const T*)p.added + row : nullptr;
    normalise<WHOLE>(p.channels, p.eps, p.weight, p.bias, (Y*)p.y + row, [&](int c, int count, float(&v)[VECTOR]) {
        load<WHOLE>(x + c, count, v);
        if (!added) return;
        float more[VECTOR];
        load<WHOLE>(added + c, count, more);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] += more[i];
        store<WHOLE>(x + c, count, v);
    });
}

template <class T, class Y>
__device__ __forceinline__ void norm_to(const Norm& p) {
    if (all_vectorizable(p.x, p.added, p.weight, p.bias, p.y, p.channels)) norm_of<T, Y, true>(p);
    else norm_of<T, Y, false>(p);
}
template <class T>
__device__ void norm(const Norm& p) { norm_to<T, T>(p); }
template <class T>
__device__ void norm_wide(const Norm& p) { norm_to<T, float>(p); }

template <class T, bool WHOLE>
__device__ void gated_norm_of(const GatedNorm& p) {
    const int first = blockIdx.y * p.group;
    const long long at = (long long)blockIdx.x * p.groups * p.group + first;
    const T *x = (const T*)p.x + at, *gate = (const T*)p.gate + (long long)blockIdx.x * p.gate_row + first;
    normalise<WHOLE>(p.group, p.eps, p.weight + first, nullptr, (T*)p.y + at, [&](int c, int count, float(&v)[VECTOR]) {
        float z[VECTOR];
        load<WHOLE>(x + c, count, v), load<WHOLE>(gate + c, count, z);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] *= silu(z[i]);
    });
}

template <class T>
__device__ void gated_norm(const GatedNorm& p) {
    if (all_vectorizable(p.x, p.gate, p.weight, p.y, p.group, p.gate_row)) gated_norm_of<T, true>(p);
    else gated_norm_of<T, false>(p);
}

}  // namespace hybrid

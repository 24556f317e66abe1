// RWKV's layer norm of each head, then the bonus (a factor per head
// times the token's value), then the gate.
//
// A lane has eight channels. A head has a power of two of adjacent lanes.
#pragma once
#include "../args.cuh"
#include "row_vectors.cuh"

namespace hybrid {

constexpr int HEAD_NORM_THREADS = 128;

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <class T, bool WHOLE>
__device__ void head_norm_of(const HeadNorm& p) {
    int lanes = 1;
    while (lanes * VECTOR < p.dim) lanes *= 2;
    const long long thread = (long long)blockIdx.x * HEAD_NORM_THREADS + threadIdx.x, of_row = thread / lanes;
    const int c = int(thread % lanes) * VECTOR, count = of_row < (long long)p.rows * p.heads ? max(0, min(VECTOR, p.dim - c)) : 0;
    const int channel = int(of_row % p.heads) * p.dim + c;
    const long long at = of_row * p.dim + c;
    // Lanes without channels take part in the sums.
    float x[VECTOR] = {}, gate[VECTOR], v[VECTOR] = {}, sum = 0;
    if (count) load<WHOLE>((const T*)p.x + at, count, x), load<WHOLE>((const T*)p.gate + at, count, gate);
    if (count && p.bonus) load<WHOLE>((const T*)p.v + at, count, v);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum += x[i];
    const float mean = sum_of_lanes(sum, lanes) / p.dim;
    sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        x[i] -= mean;
        if (i < count) sum = fmaf(x[i], x[i], sum);
    }
    const float scale = rsqrtf(sum_of_lanes(sum, lanes) / p.dim + p.eps);
    if (!count) return;
    float weight[VECTOR], bias[VECTOR];
    load<WHOLE>(p.weight + channel, count, weight), load<WHOLE>(p.bias + channel, count, bias);
    const float bonus = p.bonus ? p.bonus[of_row] : 0.f;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        x[i] = fmaf(bonus, v[i], fmaf(x[i] * scale, weight[i], bias[i])) * (p.silu ? silu(gate[i]) : gate[i]);
    }
    store<WHOLE>((T*)p.y + at, count, x);
}

template <class T>
__device__ void head_norm(const HeadNorm& p) {
    if (all_vectorizable(p.x, p.gate, p.v, p.weight, p.bias, p.y, p.dim)) head_norm_of<T, true>(p);
    else head_norm_of<T, false>(p);
}

}  // namespace hybrid

// What happens to rows between products: sums of layers with the norm after them, RWKV's token shift, and the norms of a recurrence's
// output with its gate. One pass over memory each, where a library's operations would take one for each sign in the formula.
#pragma once
#include "number.cuh"

namespace hybrid {

// sum = x + added, y = norm(sum) o weight: a layer norm with bias, an RMS norm without. Grid (rows), NORM_THREADS threads.
struct NormRows {
    const float* x;              // [rows][channels]
    const void* added;           // T, [rows][channels]; may be null: nothing is added, and `sum` not written
    const float *weight, *bias;  // [channels]; bias may be null
    float* sum;                  // [rows][channels]
    void* y;                     // T, [rows][channels]
    int channels;
    float eps;
};

// y of a mix = x + (before - x) o (weight + more), before being the row before. Grid (rows, channels / SHIFT_THREADS), SHIFT_THREADS threads.
struct Shift {
    const void* x;         // T, [batch][tokens][channels]
    const float* before;   // [batch][channels]: before each entry's first row
    float* last;           // [batch][channels]: each entry's last row; not `before`
    const float* weights;  // [mixes][channels]
    const void* more;      // T, [mixes][batch][tokens][channels]; may be null
    void* y;               // T, [mixes][batch][tokens][channels]
    int tokens, channels, mixes;
};

// out = (layer norm of each head of y, o weight + bias, + own v) o f(gate), f being SiLU or nothing. Grid (rows), HEAD_NORM_THREADS threads.
struct HeadNorm {
    const void* y;               // T, [rows][heads * dim]
    const void* gate;            // T, [rows][heads * dim]
    const float *weight, *bias;  // [heads * dim]
    const float* own;            // [rows][heads]; may be null: no v is added
    const void* v;               // T, [rows][heads * dim]
    void* out;                   // T, [rows][heads * dim]
    int heads, dim, silu;
    float eps;
};

// out = RMS norm of each group of channels of y silu(gate), o weight. Grid (rows, groups), NORM_THREADS threads.
struct GatedNorm {
    const void* y;        // T, [rows][groups * group]
    const void* gate;     // T, rows of groups * group
    const float* weight;  // [groups * group]
    void* out;            // T, [rows][groups * group]
    int groups, group, gate_row;
    float eps;
};

constexpr int NORM_THREADS = 512, SHIFT_THREADS = 256, HEAD_NORM_THREADS = 256;

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Of a block's threads, the same for all of them.
__device__ __forceinline__ float sum_of_block(float x) {
    __shared__ float parts[NORM_THREADS / 32];
    x = sum_of_warp(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) sum += parts[i];
    __syncthreads();
    return sum;
}

template <class T>
__device__ void norm_rows(const NormRows& p) {
    const long long row = (long long)blockIdx.x * p.channels;
    const T* added = (const T*)p.added + row;
    const float* x = (p.added ? p.sum : p.x) + row;
    float sum = 0;
    for (int c = threadIdx.x; c < p.channels; c += NORM_THREADS) {
        float value = p.x[row + c];
        if (p.added) value += number(added[c]), p.sum[row + c] = value;
        sum += p.bias ? value : value * value;
    }
    float mean = 0, square = sum_of_block(sum) / p.channels;
    if (p.bias) {
        mean = square, sum = 0;
        for (int c = threadIdx.x; c < p.channels; c += NORM_THREADS) {
            const float apart = x[c] - mean;
            sum = fmaf(apart, apart, sum);
        }
        square = sum_of_block(sum) / p.channels;
    }
    const float scale = rsqrtf(square + p.eps);
    T* y = (T*)p.y + row;
    for (int c = threadIdx.x; c < p.channels; c += NORM_THREADS) {
        const float value = (x[c] - mean) * scale * p.weight[c];
        y[c] = rounded<T>(p.bias ? value + p.bias[c] : value);
    }
}

template <class T>
__device__ void shift(const Shift& p) {
    const int c = blockIdx.y * SHIFT_THREADS + threadIdx.x, rows = gridDim.x;
    if (c >= p.channels) return;
    const int entry = blockIdx.x / p.tokens, token = blockIdx.x % p.tokens;
    const long long at = (long long)blockIdx.x * p.channels + c, state = (long long)entry * p.channels + c;
    const T* x = (const T*)p.x + at;
    const float here = number(*x), before = token > 0 ? number(*(x - p.channels)) : p.before[state];
    if (token == p.tokens - 1) p.last[state] = here;
    for (int mix = 0; mix < p.mixes; mix++) {
        const long long of_mix = (long long)mix * rows * p.channels + at;
        float weight = p.weights[(long long)mix * p.channels + c];
        if (p.more) weight += number(((const T*)p.more)[of_mix]);
        ((T*)p.y)[of_mix] = rounded<T>(fmaf(before - here, weight, here));
    }
}

// A warp takes a head; dim <= 128.
template <class T>
__device__ void head_norm(const HeadNorm& p) {
    constexpr int WARPS = HEAD_NORM_THREADS / 32, MOST = 4;
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * p.heads;
    for (int head = threadIdx.x / 32; head < p.heads; head += WARPS) {
        const long long at = (row + head) * p.dim;
        const T* y = (const T*)p.y + at;
        float x[MOST], sum = 0;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const int c = lane + 32 * i;
            sum += x[i] = c < p.dim ? number(y[c]) : 0.f;
        }
        const float mean = sum_of_warp(sum) / p.dim;
        sum = 0;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (lane + 32 * i < p.dim) x[i] -= mean, sum = fmaf(x[i], x[i], sum);
        }
        const float scale = rsqrtf(sum_of_warp(sum) / p.dim + p.eps), own = p.own ? p.own[row + head] : 0.f;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            const int c = lane + 32 * i, channel = head * p.dim + c;
            if (c >= p.dim) continue;
            float value = fmaf(x[i] * scale, p.weight[channel], p.bias[channel]);
            if (p.own) value = fmaf(own, number(((const T*)p.v)[at + c]), value);
            const float gate = number(((const T*)p.gate)[at + c]);
            ((T*)p.out)[at + c] = rounded<T>(value * (p.silu ? silu(gate) : gate));
        }
    }
}

template <class T>
__device__ void gated_norm(const GatedNorm& p) {
    const int first = blockIdx.y * p.group;
    const long long at = (long long)blockIdx.x * p.groups * p.group + first;
    const T *y = (const T*)p.y + at, *gate = (const T*)p.gate + (long long)blockIdx.x * p.gate_row + first;
    float sum = 0;
    for (int c = threadIdx.x; c < p.group; c += NORM_THREADS) {
        const float x = number(y[c]) * silu(number(gate[c]));
        sum = fmaf(x, x, sum);
    }
    const float scale = rsqrtf(sum_of_block(sum) / p.group + p.eps);
    for (int c = threadIdx.x; c < p.group; c += NORM_THREADS) {
        const float x = number(y[c]) * silu(number(gate[c]));
        ((T*)p.out)[at + c] = rounded<T>(x * scale * p.weight[first + c]);
    }
}

}  // namespace hybrid

// Mamba's selective scan for any number of states, token by token. A warp has a channel; its lanes
// share the states.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int SCAN_GENERIC_THREADS = 128, SCAN_GENERIC_STATES = 256;

// Grid (channels / 4 rounded up, batch).
template <class T>
__device__ void selective_scan_generic(const SelectiveScan& p) {
    constexpr int N = SCAN_GENERIC_STATES / 32;
    const int channel = blockIdx.x * (SCAN_GENERIC_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (channel >= p.channels) return;
    const long long row = (long long)blockIdx.y * p.tokens;
    float* state = p.state + ((long long)blockIdx.y * p.channels + channel) * p.states;
    float a[N], h[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int n = lane + 32 * i;
        a[i] = n < p.states ? p.a[(long long)channel * p.states + n] * LOG2_E : 0.f;
        h[i] = n < p.states ? state[n] : 0.f;
    }
    for (int t = 0; t < p.tokens; t++) {
        const float u = number(((const T*)p.u)[(row + t) * p.u_row + channel]);
        const float dt = softplus(number(((const T*)p.steps)[(row + t) * p.steps_row + channel]) + p.bias[channel]);
        const T *b = (const T*)p.b + (row + t) * p.b_row, *c = (const T*)p.c + (row + t) * p.c_row;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int n = lane + 32 * i;
            if (n >= p.states) break;
            h[i] = fmaf(exp2_of(dt * a[i]), h[i], dt * u * number(b[n]));
            sum = fmaf(h[i], number(c[n]), sum);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const float gate = p.z ? silu(number(((const T*)p.z)[(row + t) * p.z_row + channel])) : 1.f;
        if (lane == 0) ((T*)p.y)[(row + t) * p.y_row + channel] = rounded<T>(fmaf(p.d[channel], u, sum) * gate);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (lane + 32 * i < p.states) state[lane + 32 * i] = h[i];
    }
}

}  // namespace hybrid

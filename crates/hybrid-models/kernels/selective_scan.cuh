// Mamba's selective scan (Gu and Dao, arXiv 2312.00752), prefill and decode:
//
//     h <- exp(dt A) h + dt B u,  y = (C h + D u) silu(z),  dt = softplus(steps + bias)
//
// A block takes CHANNELS channels through all tokens; LANES threads share a channel's 16 states, which stay in registers. What costs
// special functions and depends on no state (dt, the gate) is computed once per token and channel by all threads, a tile of
// tokens at a time. The next tile is on its way from memory while the states pass over this one.
#pragma once
#include "number.cuh"

namespace hybrid {

struct SelectiveScan {
    const void *u, *steps, *z;  // [batch, tokens, channels]
    const void *b, *c;          // [batch, tokens, 16]
    const float *a;             // [channels, 16]
    const float *d, *bias;      // [channels]
    float* state;               // [batch, channels, 16], read and written
    void* y;                    // [batch, tokens, channels]
    int tokens, channels;
};

constexpr int STATES = 16, LANES = 4, CHANNELS = 16, SCAN_THREADS = LANES * CHANNELS, SCAN_TILE = 32;

// Grid: (channels / CHANNELS rounded up, batch); SCAN_THREADS threads.
template <class T>
__global__ void __launch_bounds__(SCAN_THREADS) selective_scan(SelectiveScan p) {
    constexpr int PER_LANE = STATES / LANES, TOKEN_STEP = SCAN_THREADS / CHANNELS, PAIRS = SCAN_TILE / TOKEN_STEP;
    constexpr int SELECTED = SCAN_TILE * STATES / SCAN_THREADS;
    __shared__ float2 inputs[SCAN_TILE][CHANNELS];  // dt and dt u
    __shared__ float4 b[SCAN_TILE][LANES], c[SCAN_TILE][LANES];
    __shared__ float4 sums[SCAN_TILE][CHANNELS];  // Of C h, one part a lane.

    const int thread = threadIdx.x, first = blockIdx.x * CHANNELS, lane = thread % LANES, own = thread / LANES;
    const long long row = (long long)blockIdx.y * p.tokens;
    // Of the pairs (token, channel) of a tile, a thread prepares those of one channel.
    const int channel = thread % CHANNELS, token_at = thread / CHANNELS;
    const bool has_channel = first + channel < p.channels, has_own = first + own < p.channels;
    const int channel_at = has_channel ? first + channel : p.channels - 1;
    const float d = p.d[channel_at], bias = p.bias[channel_at];
    const T *u_of = (const T*)p.u + row * p.channels + channel_at, *steps_of = (const T*)p.steps + row * p.channels + channel_at,
            *z_of = (const T*)p.z + row * p.channels + channel_at;
    const T *b_of = (const T*)p.b + row * STATES, *c_of = (const T*)p.c + row * STATES;
    T* y_of = (T*)p.y + row * p.channels + channel_at;

    float a[PER_LANE], h[PER_LANE];
    float* state = p.state + ((long long)blockIdx.y * p.channels + first + own) * STATES + lane * PER_LANE;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        a[i] = has_own ? p.a[(first + own) * STATES + lane * PER_LANE + i] * LOG2_E : 0;
        h[i] = has_own ? state[i] : 0;
    }

    // All loads of a tile at once. Beyond the last token, its numbers are read again, and not used.
    T u_next[PAIRS], steps_next[PAIRS], z_next[PAIRS], b_next[SELECTED], c_next[SELECTED];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const long long at = (long long)min(start + token_at + i * TOKEN_STEP, p.tokens - 1) * p.channels;
            u_next[i] = u_of[at], steps_next[i] = steps_of[at], z_next[i] = z_of[at];
        }
#pragma unroll
        for (int i = 0; i < SELECTED; i++) {
            const int at = thread + i * SCAN_THREADS, t = min(start + at / STATES, p.tokens - 1);
            b_next[i] = b_of[(long long)t * STATES + at % STATES], c_next[i] = c_of[(long long)t * STATES + at % STATES];
        }
    };
    auto step = [&](int t) {
        const float2 in = inputs[t][own];
        const float4 b4 = b[t][lane], c4 = c[t][lane];
        const float bs[] = {b4.x, b4.y, b4.z, b4.w}, cs[] = {c4.x, c4.y, c4.z, c4.w};
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            h[i] = fmaf(exp2_of(in.x * a[i]), h[i], in.y * bs[i]);
            sum = fmaf(h[i], cs[i], sum);
        }
        ((float*)&sums[t][own])[lane] = sum;
    };

    load(0);
    for (int start = 0; start < p.tokens; start += SCAN_TILE) {
        const int count = min(SCAN_TILE, p.tokens - start);
        T u[PAIRS], z[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            u[i] = u_next[i], z[i] = z_next[i];
            const float dt = softplus(number(steps_next, i) + bias);
            inputs[token_at + i * TOKEN_STEP][channel] = make_float2(dt, dt * number(u, i));
        }
#pragma unroll
        for (int i = 0; i < SELECTED; i++) {
            ((float*)b)[thread + i * SCAN_THREADS] = number(b_next, i);
            ((float*)c)[thread + i * SCAN_THREADS] = number(c_next, i);
        }
        __syncthreads();
        if (start + SCAN_TILE < p.tokens) load(start + SCAN_TILE);
        if (count == SCAN_TILE) {
#pragma unroll 8
            for (int t = 0; t < SCAN_TILE; t++) step(t);
        } else {
            for (int t = 0; t < count; t++) step(t);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int t = token_at + i * TOKEN_STEP;
            const float4 sum = sums[t][channel];
            const float y = fmaf(d, number(u, i), (sum.x + sum.y) + (sum.z + sum.w)) * silu(number(z, i));
            if (has_channel && t < count) put(y_of, (long long)(start + t) * p.channels, y);
        }
        // The next tile overwrites inputs, b and c, which all have read; sums only after the next barrier.
    }
    if (!has_own) return;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) state[i] = h[i];
}

}  // namespace hybrid

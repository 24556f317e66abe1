// Mamba's selective scan (Gu and Dao, arXiv 2312.00752) for 16 states, prefill and decode:
//
//     h <- exp(dt A) h + dt B u,  y = (C h + D u) silu(z),  dt = softplus(steps + bias)
//
// A block takes CHANNELS channels through all tokens; LANES threads share a channel's states, which stay in registers. What costs
// special functions and depends on no state (dt, the gate) is computed once per token and channel by all threads, a tile of
// tokens at a time. The next tile is on its way from memory while the states pass over this one.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int STATES = 16, SCAN_CHANNELS = 16, SCAN_TILE = 32;

template <int LANES>
constexpr int SCAN_THREADS = LANES* SCAN_CHANNELS;

// Grid (channels / SCAN_CHANNELS rounded up, batch); SCAN_THREADS<LANES> threads.
template <class T, int LANES>
__device__ void selective_scan_lanes(const SelectiveScan& p) {
    constexpr int THREADS = SCAN_THREADS<LANES>, PER_LANE = STATES / LANES, TOKEN_STEP = THREADS / SCAN_CHANNELS;
    constexpr int PAIRS = SCAN_TILE / TOKEN_STEP, SELECTED = SCAN_TILE * STATES / THREADS;
    struct __align__(PER_LANE * 4) Numbers {
        float x[PER_LANE];
    };
    __shared__ float2 inputs[SCAN_TILE][SCAN_CHANNELS];  // dt and dt u
    __shared__ Numbers b[SCAN_TILE][LANES], c[SCAN_TILE][LANES];
    __shared__ float sums[SCAN_TILE][SCAN_CHANNELS + 1];  // C h

    const int thread = threadIdx.x, first = blockIdx.x * SCAN_CHANNELS, lane = thread % LANES, own = thread / LANES;
    const long long row = (long long)blockIdx.y * p.tokens;
    // Of the pairs (token, channel) of a tile, a thread prepares those of one channel.
    const int channel = thread % SCAN_CHANNELS, token_at = thread / SCAN_CHANNELS;
    const bool has_channel = first + channel < p.channels, has_own = first + own < p.channels;
    const int channel_at = has_channel ? first + channel : p.channels - 1;
    const float d = p.d[channel_at], bias = p.bias[channel_at];
    const T* u_of = (const T*)p.u + row * p.u_row + channel_at;
    const T* steps_of = (const T*)p.steps + row * p.steps_row + channel_at;
    const T* z_of = (const T*)p.z + row * p.z_row + channel_at;
    const T *b_of = (const T*)p.b + row * p.b_row, *c_of = (const T*)p.c + row * p.c_row;
    T* y_of = (T*)p.y + row * p.y_row + channel_at;

    float a[PER_LANE], h[PER_LANE];
    float* state = p.state + ((long long)blockIdx.y * p.channels + first + own) * STATES + lane * PER_LANE;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        a[i] = has_own ? p.a[(long long)(first + own) * STATES + lane * PER_LANE + i] * LOG2_E : 0;
        h[i] = has_own ? state[i] : 0;
    }

    // All loads of a tile at once. Beyond the last token, its numbers are read again, and not used.
    T u_next[PAIRS], steps_next[PAIRS], z_next[PAIRS], b_next[SELECTED], c_next[SELECTED];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const long long t = min(start + token_at + i * TOKEN_STEP, p.tokens - 1);
            u_next[i] = u_of[t * p.u_row], steps_next[i] = steps_of[t * p.steps_row];
            if (p.z) z_next[i] = z_of[t * p.z_row];
        }
#pragma unroll
        for (int i = 0; i < SELECTED; i++) {
            const int at = thread + i * THREADS;
            const long long t = min(start + at / STATES, p.tokens - 1);
            b_next[i] = b_of[t * p.b_row + at % STATES], c_next[i] = c_of[t * p.c_row + at % STATES];
        }
    };
    auto step = [&](int t) {
        const float2 in = inputs[t][own];
        const Numbers bs = b[t][lane], cs = c[t][lane];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            h[i] = fmaf(exp2_of(in.x * a[i]), h[i], in.y * bs.x[i]);
            sum = fmaf(h[i], cs.x[i], sum);
        }
        return sum;
    };

    load(0);
    for (int start = 0; start < p.tokens; start += SCAN_TILE) {
        const int count = min(SCAN_TILE, p.tokens - start);
        T u[PAIRS], z[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            u[i] = u_next[i], z[i] = z_next[i];
            const int t = token_at + i * TOKEN_STEP;
            // A token beyond the last leaves the states as they are.
            const float dt = t < count ? softplus(number(steps_next[i]) + bias) : 0.f;
            inputs[t][channel] = make_float2(dt, dt * number(u[i]));
        }
#pragma unroll
        for (int i = 0; i < SELECTED; i++) {
            ((float*)b)[thread + i * THREADS] = number(b_next[i]);
            ((float*)c)[thread + i * THREADS] = number(c_next[i]);
        }
        __syncthreads();
        if (start + SCAN_TILE < p.tokens) load(start + SCAN_TILE);
        for (int from = 0; from < count; from += 2 * LANES) {
            float part[2][LANES];
#pragma unroll
            for (int i = 0; i < 2 * LANES; i++) part[i / LANES][i % LANES] = step(from + i);
            sums[from + lane][own] = sums_of_lanes<LANES>(part[0], lane);
            sums[from + LANES + lane][own] = sums_of_lanes<LANES>(part[1], lane);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int t = token_at + i * TOKEN_STEP;
            float y = fmaf(d, number(u[i]), sums[t][channel]);
            if (p.z) y *= silu(number(z[i]));
            if (has_channel && t < count) y_of[(long long)(start + t) * p.y_row] = rounded<T>(y);
        }
        // The next tile overwrites inputs, b and c, which all have read; sums only after the next barrier.
    }
    if (!has_own) return;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) state[i] = h[i];
}

constexpr int SCAN_LANES = 8;

template <class T>
__device__ void selective_scan(const SelectiveScan& p) { selective_scan_lanes<T, SCAN_LANES>(p); }

}  // namespace hybrid

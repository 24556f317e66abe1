// The causal depthwise convolution before a recurrence, with its bias and SiLU, for prefill and
// decode. The state is updated in place.
//
// A thread processes LANE adjacent channels of RUN tokens. The inputs under the taps stay in
// registers.
#pragma once
#include "args.cuh"
#include "aligned_vector.cuh"

namespace hybrid {

constexpr int CONV_THREADS = 128, CONV_CHANNELS = 256, CONV_TOKENS = 64, CONV_LANE = 4, CONV_AHEAD = 8;
constexpr int CONV_LANES = CONV_CHANNELS / CONV_LANE, CONV_RUN = CONV_TOKENS * CONV_LANES / CONV_THREADS;

// Processes V channels from `channel` on, with at most TAPS taps. If there are fewer taps, the
// oldest have weight 0.
template <class T, int V, int TAPS>
__device__ void conv_channels(const Conv& p, int channel, int start) {
    constexpr int PAST = TAPS - 1, AHEAD = V == 1 ? 4 : CONV_AHEAD;
    const int past = p.taps - 1, entry = blockIdx.z;
    const long long row = (long long)entry * p.tokens;
    const T* x = (const T*)p.x + row * p.x_row + channel;
    T* y = (T*)p.y + row * p.y_row + channel;
    float* state = p.state + (long long)entry * past * p.channels + channel;

    float weight[TAPS][V], bias[V], in[PAST + AHEAD][V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        bias[i] = p.bias ? p.bias[channel + i] : 0.f;
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            const int tap = j - (TAPS - p.taps);
            weight[j][i] = tap >= 0 ? p.weight[(long long)tap * p.channels + channel + i] : 0.f;
        }
    }
#pragma unroll
    for (int j = 0; j < PAST; j++) {
        const int t = start - PAST + j;
        if (t >= 0) {
            load<T, V>(x + (long long)t * p.x_row, in[j]);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) in[j][i] = t + past >= 0 ? state[(long long)(t + past) * p.channels + i] : 0.f;
        }
    }
    const int end = min(start + CONV_RUN, p.tokens);
    for (int t = start; t < end; t += AHEAD) {
        const T* from = x + (long long)t * p.x_row;
        T* to = y + (long long)t * p.y_row;
        const int count = end - t;
        // Reads the last token again in place of tokens beyond it.
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            load<T, V>(from, in[PAST + a]);
            if (a + 1 < count) from += p.x_row;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            float sum[V];
#pragma unroll
            for (int i = 0; i < V; i++) {
                sum[i] = bias[i];
#pragma unroll
                for (int j = 0; j < TAPS; j++) sum[i] = fmaf(weight[j][i], in[a + j][i], sum[i]);
                if (p.silu) sum[i] = silu(sum[i]);
            }
            if (a < count) store<T, V>(to, sum);
            to += p.y_row;
        }
#pragma unroll
        for (int j = 0; j < PAST; j++) {
#pragma unroll
            for (int i = 0; i < V; i++) in[j][i] = in[j + AHEAD][i];
        }
    }
    if (start > 0) return;
    // Only this thread has read the state of these channels. Rows move towards the front, so none
    // is overwritten before it is read.
    for (int j = 0; j < past; j++) {
        const int t = p.tokens - past + j;
#pragma unroll
        for (int i = 0; i < V; i++) {
            state[(long long)j * p.channels + i] = t >= 0 ? number(x[(long long)t * p.x_row + i]) : state[(long long)(t + past) * p.channels + i];
        }
    }
}

// Grid (channels / CONV_CHANNELS, tokens / CONV_TOKENS, batch), both rounded up; CONV_THREADS
// threads.
template <class T>
__device__ void conv(const Conv& p) {
    const int lane = threadIdx.x % CONV_LANES, first = blockIdx.x * CONV_CHANNELS;
    const int start = blockIdx.y * CONV_TOKENS + threadIdx.x / CONV_LANES * CONV_RUN;
    if (start >= p.tokens) return;
    const bool aligned = ((size_t)p.x | (size_t)p.y) % 16 == 0 && (p.x_row | p.y_row | p.channels) % CONV_LANE == 0;
    if (aligned && p.taps == 4) {
        const int channel = first + lane * CONV_LANE;
        if (channel < p.channels) conv_channels<T, CONV_LANE, 4>(p, channel, start);
        return;
    }
    for (int channel = first + lane; channel < min(first + CONV_CHANNELS, p.channels); channel += CONV_LANES) {
        conv_channels<T, 1, 8>(p, channel, start);
    }
}

}  // namespace hybrid

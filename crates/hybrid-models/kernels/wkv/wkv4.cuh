// RWKV-4's recurrence (Peng and others, arXiv 2305.13048), prefill and decode. A thread processes a
// channel through all tokens. Numerator and denominator are relative to the largest exponent so
// far.
#pragma once
#include "../args.cuh"
#include "../number.cuh"

namespace hybrid {

constexpr int WKV4_THREADS = 128;

// Grid (channels / WKV4_THREADS rounded up, batch).
template <class T>
__device__ void wkv4(const Wkv4& p) {
    const int channel = blockIdx.x * WKV4_THREADS + threadIdx.x;
    if (channel >= p.channels) return;
    const long long row = (long long)blockIdx.y * p.tokens, at = (long long)blockIdx.y * p.state_entry + channel;
    const T *k = (const T*)p.k + row * p.k_row + channel, *v = (const T*)p.v + row * p.v_row + channel;
    T* y = (T*)p.y + row * p.y_row + channel;
    const float decay = p.decay[channel], first = p.first[channel];
    float numerator = p.numerator[at], denominator = p.denominator[at], largest = p.largest[at];
    constexpr int AHEAD = 8;
    for (int start = 0; start < p.tokens; start += AHEAD) {
        T keys[AHEAD], values[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const long long t = min(start + i, p.tokens - 1);
            keys[i] = k[t * p.k_row], values[i] = v[t * p.v_row];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (start + i >= p.tokens) break;
            const float key = number(keys[i]), value = number(values[i]), own = key + first;
            float top = fmaxf(largest, own), a = exp_of(largest - top), b = exp_of(own - top);
            const float sum = __fdividef(fmaf(a, numerator, b * value), fmaf(a, denominator, b));
            y[(long long)(start + i) * p.y_row] = rounded<T>(sum);
            top = fmaxf(largest + decay, key), a = exp_of(largest + decay - top), b = exp_of(key - top);
            numerator = fmaf(a, numerator, b * value), denominator = fmaf(a, denominator, b), largest = top;
        }
    }
    p.numerator[at] = numerator, p.denominator[at] = denominator, p.largest[at] = largest;
}

}  // namespace hybrid

// RWKV-5's recurrence (Peng and others, arXiv 2404.05892), prefill and decode: per head of 64 channels
//
//     y = S' r + (r . (u o k)) v,  S <- diag(w) S + k v'
//
// Columns of S (values) don't meet: a block takes VALUES of a head's 64 through all tokens. Four threads share a column's 64 keys,
// which stay in registers. The next tile of tokens is on its way from memory while they pass over this one.
#pragma once
#include "number.cuh"

namespace hybrid {

struct Wkv5 {
    const void *r, *k, *v;  // [batch, tokens, heads, 64]
    const float *w, *u;     // [heads, 64]
    float* state;           // [batch, heads, 64 keys, 64 values], read and written
    void* y;                // [batch, tokens, heads, 64]
    int tokens, heads;
};

constexpr int HEAD = 64, VALUES = 32, WKV_THREADS = 4 * VALUES, WKV_TILE = 16;

// Grid: (64 / VALUES, heads, batch); WKV_THREADS threads.
template <class T>
__global__ void __launch_bounds__(WKV_THREADS) wkv5(Wkv5 p) {
    constexpr int KEYS = WKV_TILE * HEAD / WKV_THREADS, OUTPUTS = WKV_TILE * VALUES / WKV_THREADS;
    constexpr int KEY_STEP = WKV_THREADS / HEAD, OUTPUT_STEP = WKV_THREADS / VALUES;
    __shared__ float4 r[WKV_TILE][HEAD / 4], k[WKV_TILE][HEAD / 4], sums[WKV_TILE][VALUES];  // sums: of S' r, one part a thread.
    __shared__ float v[WKV_TILE][VALUES], own[WKV_TILE], u[HEAD];

    const int thread = threadIdx.x, part = thread % 4, column = thread / 4;
    const int head = blockIdx.y, first = blockIdx.x * VALUES, width = p.heads * HEAD;
    const long long rows = (long long)blockIdx.z * p.tokens * width + head * HEAD;
    const T *r_of = (const T*)p.r + rows + thread % HEAD, *k_of = (const T*)p.k + rows + thread % HEAD;
    const T* v_of = (const T*)p.v + rows + first + thread % VALUES;
    T* y_of = (T*)p.y + rows + first + thread % VALUES;
    float* state = p.state + ((long long)blockIdx.z * p.heads + head) * HEAD * HEAD + first + column;
    // Keys 4 (part + 4 m) + e: the four threads of a column read 64 bytes side by side.
    auto key = [&](int m, int e) { return 4 * (part + 4 * m) + e; };
    float s[4][4], w[4][4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[m][e] = state[key(m, e) * HEAD];
            w[m][e] = p.w[head * HEAD + key(m, e)];
        }
    }
    if (thread < HEAD) u[thread] = p.u[head * HEAD + thread];

    // All loads of a tile at once. Beyond the last token, its numbers are read again, and not used.
    T r_next[KEYS], k_next[KEYS], v_next[OUTPUTS];
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const long long at = (long long)min(start + thread / HEAD + i * KEY_STEP, p.tokens - 1) * width;
            r_next[i] = r_of[at], k_next[i] = k_of[at];
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            v_next[i] = v_of[(long long)min(start + thread / VALUES + i * OUTPUT_STEP, p.tokens - 1) * width];
        }
    };
    auto step = [&](int t) {
        const float value = v[t][column];
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const float4 r4 = r[t][part + 4 * m], k4 = k[t][part + 4 * m];
            const float rs[] = {r4.x, r4.y, r4.z, r4.w}, ks[] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum[m] = fmaf(rs[e], s[m][e], sum[m]);
                s[m][e] = fmaf(w[m][e], s[m][e], ks[e] * value);
            }
        }
        ((float*)&sums[t][column])[part] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    };

    load(0);
    for (int start = 0; start < p.tokens; start += WKV_TILE) {
        const int count = min(WKV_TILE, p.tokens - start);
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            ((float*)r)[thread + i * WKV_THREADS] = number(r_next, i);
            ((float*)k)[thread + i * WKV_THREADS] = number(k_next, i);
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) ((float*)v)[thread + i * WKV_THREADS] = number(v_next, i);
        __syncthreads();
        if (start + WKV_TILE < p.tokens) load(start + WKV_TILE);
        {  // r . (u o k), eight threads a token.
            const int t = thread / 8;
            float sum = 0;
#pragma unroll
            for (int c = 0; c < HEAD; c += 8) {
                const int at = c + thread % 8;
                sum += ((float*)r[t])[at] * u[at] * ((float*)k[t])[at];
            }
#pragma unroll
            for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (thread % 8 == 0) own[t] = sum;
        }
        if (count == WKV_TILE) {
#pragma unroll 4
            for (int t = 0; t < WKV_TILE; t++) step(t);
        } else {
            for (int t = 0; t < count; t++) step(t);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) {
            const int t = thread / VALUES + i * OUTPUT_STEP, c = thread % VALUES;
            const float4 sum = sums[t][c];
            const float y = fmaf(own[t], v[t][c], (sum.x + sum.y) + (sum.z + sum.w));
            if (t < count) put(y_of, (long long)(start + t) * width, y);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) state[key(m, e) * HEAD] = s[m][e];
    }
}

}  // namespace hybrid

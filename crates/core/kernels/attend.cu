// Attention of a few queries over a long dense cache in f16 or bf16, split over positions (flash decoding), then joined.
//
// LANES threads share a token: 16 channels each, read with two 16-byte loads. A group of them keeps its own running softmax for all COLUMNS
// (the query heads of the kv head times the queries) while it strides through its block's tokens, the next ones already on their way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>

struct Args {
    const void *q;                     // [batch, heads, queries, D]
    const void *k, *v;                 // rows [batch * kv_heads] of tokens, each `row` numbers after the one before
    float *out, *lse;                  // [batch, heads, queries, D] and [batch, heads, queries], natural logarithm
    float *part_out, *part_max, *part_sum;  // [rows, splits, heads of a kv head * queries] of D, 1 and 1
    long long row;
    int tokens, columns, queries, splits;
    int causal, window;                // the last `queries` tokens are the queries' own; how many a query sees (0: all)
    float scale, soft_cap;             // soft_cap 0: none
};
static_assert(sizeof(Args) == 104 && offsetof(Args, row) == 64 && offsetof(Args, tokens) == 72 && offsetof(Args, scale) == 96,
              "as in src/attention/cuda/decode.rs");

constexpr int THREADS = 128, CHANNELS = 16, TOKENS = 2;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <class Pair>
__device__ __forceinline__ void widen(float* y, const uint4 (&x)[2]) {
    const Pair* pairs = reinterpret_cast<const Pair*>(x);
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) {
        float2 two = widen(pairs[i]);
        y[2 * i] = two.x, y[2 * i + 1] = two.y;
    }
}

// A thread's 16 channels of a row of D: two chunks of 8, so that a group's loads are side by side.
template <int D>
__device__ __forceinline__ void load(uint4 (&x)[2], const void* rows, long long at, int lane) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const __half*>(rows) + at);
    x[0] = p[lane], x[1] = p[D / CHANNELS + lane];
}

// Grid: (splits, batch * kv_heads, columns / COLUMNS rounded up).
template <class Pair, int D, int COLUMNS>
__device__ __forceinline__ void attend(const Args& a) {
    constexpr int LANES = D / CHANNELS, GROUPS = THREADS / LANES;
    __shared__ float outs[GROUPS][COLUMNS][D], maxima[GROUPS][COLUMNS], sums[GROUPS][COLUMNS];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, first = blockIdx.z * COLUMNS;
    const long long row = blockIdx.y;

    float q[COLUMNS][CHANNELS], acc[COLUMNS][CHANNELS], top[COLUMNS], sum[COLUMNS];
    int from[COLUMNS], to[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int column = min(first + c, a.columns - 1);  // A column too many repeats the last one.
        uint4 x[2];
        load<D>(x, a.q, (row * a.columns + column) * D, lane);
        widen<Pair>(q[c], x);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) q[c][i] *= a.scale, acc[c][i] = 0.f;
        top[c] = -INFINITY, sum[c] = 0.f;
        to[c] = a.causal ? a.tokens - a.queries + 1 + column % a.queries : a.tokens;
        from[c] = a.causal && a.window ? to[c] - a.window : 0;
    }

    // With a window, tokens before the oldest query's are not read.
    const int oldest = a.causal && a.window ? max(0, a.tokens - a.queries + 1 - a.window) : 0;
    const long long count = a.tokens - oldest;
    const int begin = oldest + int(count * blockIdx.x / a.splits), end = oldest + int(count * (blockIdx.x + 1) / a.splits);
    uint4 k[TOKENS][2], v[TOKENS][2], next_k[TOKENS][2], next_v[TOKENS][2];
    auto fetch = [&](int t) {
#pragma unroll
        for (int u = 0; u < TOKENS; u++) {
            const long long at = row * a.row + (long long)min(t + u * GROUPS, end - 1) * D;
            load<D>(next_k[u], a.k, at, lane), load<D>(next_v[u], a.v, at, lane);
        }
    };
    if (begin + group < end) fetch(begin + group);
    // All lanes of a group take the same path; `group_mask` names them.
    const unsigned group_mask = LANES == 32 ? ~0u : ((1u << LANES) - 1) << (threadIdx.x % 32 / LANES * LANES);
    for (int t = begin + group; t < end; t += TOKENS * GROUPS) {
#pragma unroll
        for (int u = 0; u < TOKENS; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) k[u][i] = next_k[u][i], v[u][i] = next_v[u][i];
        if (t + TOKENS * GROUPS < end) fetch(t + TOKENS * GROUPS);
        float s[TOKENS][COLUMNS];
#pragma unroll
        for (int u = 0; u < TOKENS; u++) {
            float x[CHANNELS];
            widen<Pair>(x, k[u]);
            const int token = t + u * GROUPS;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float dot = 0.f;
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) dot = fmaf(q[c][i], x[i], dot);
#pragma unroll
                for (int i = LANES / 2; i > 0; i /= 2) dot += __shfl_xor_sync(group_mask, dot, i);
                if (a.soft_cap > 0.f) dot = a.soft_cap * tanhf(dot / a.soft_cap);
                s[u][c] = token < end && token >= from[c] && token < to[c] ? dot * LOG2E : -INFINITY;
            }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            float higher = top[c];
#pragma unroll
            for (int u = 0; u < TOKENS; u++) higher = fmaxf(higher, s[u][c]);
            if (higher == -INFINITY) continue;  // Nothing seen yet.
            if (higher > top[c]) {
                const float factor = exp2f(top[c] - higher);
                top[c] = higher, sum[c] *= factor;
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) acc[c][i] *= factor;
            }
#pragma unroll
            for (int u = 0; u < TOKENS; u++) s[u][c] = exp2f(s[u][c] - higher), sum[c] += s[u][c];
        }
#pragma unroll
        for (int u = 0; u < TOKENS; u++) {
            float x[CHANNELS];
            widen<Pair>(x, v[u]);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const float p = top[c] == -INFINITY ? 0.f : s[u][c];
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) acc[c][i] = fmaf(p, x[i], acc[c][i]);
            }
        }
    }

    // Join the block's groups.
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        if (lane == 0) maxima[group][c] = top[c], sums[group][c] = sum[c];
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) outs[group][c][(i / 8 * LANES + lane) * 8 + i % 8] = acc[c][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS * D; i += THREADS) {
        const int c = i / D, channel = i % D, column = first + c;
        if (column >= a.columns) break;
        float highest = maxima[0][c], whole = 0.f, value = 0.f;
        for (int g = 1; g < GROUPS; g++) highest = fmaxf(highest, maxima[g][c]);
        for (int g = 0; g < GROUPS && highest > -INFINITY; g++) {
            const float factor = exp2f(maxima[g][c] - highest);
            whole = fmaf(sums[g][c], factor, whole), value = fmaf(outs[g][c][channel], factor, value);
        }
        const long long at = (row * a.splits + blockIdx.x) * a.columns + column;
        a.part_out[at * D + channel] = value;
        if (channel == 0) a.part_max[at] = highest, a.part_sum[at] = whole;
    }
}

// Grid: (batch * kv_heads * columns); a thread for each of D channels.
extern "C" __global__ void join(const Args a) {
    const int d = blockDim.x, channel = threadIdx.x;
    const long long row = blockIdx.x / a.columns, column = blockIdx.x % a.columns, first = row * a.splits * a.columns + column;
    float highest = -INFINITY, whole = 0.f, value = 0.f;
    for (int s = 0; s < a.splits; s++) highest = fmaxf(highest, a.part_max[first + (long long)s * a.columns]);
    for (int s = 0; s < a.splits && highest > -INFINITY; s++) {
        const long long at = first + (long long)s * a.columns;
        const float factor = exp2f(a.part_max[at] - highest);
        whole = fmaf(a.part_sum[at], factor, whole), value = fmaf(a.part_out[at * d + channel], factor, value);
    }
    a.out[(long long)blockIdx.x * d + channel] = whole > 0.f ? value / whole : 0.f;
    if (channel == 0) a.lse[blockIdx.x] = whole > 0.f ? (highest + log2f(whole)) / LOG2E : -INFINITY;
}

#define KERNEL(NAME, PAIR, D, COLUMNS) \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##NAME##_d##D##_c##COLUMNS(const Args a) { attend<PAIR, D, COLUMNS>(a); }
#define KERNELS(D, COLUMNS) KERNEL(f16, __half2, D, COLUMNS) KERNEL(bf16, __nv_bfloat162, D, COLUMNS)
#define HEAD_DIMS(COLUMNS) KERNELS(64, COLUMNS) KERNELS(128, COLUMNS) KERNELS(256, COLUMNS)
HEAD_DIMS(1)
HEAD_DIMS(2)
HEAD_DIMS(4)

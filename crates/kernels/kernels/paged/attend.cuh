// Attention of a few queries of many sequences: flash decoding, which splits the entries into parts
// and merges the partial results.
//
// A group of LANES threads shares an entry. Each thread has 16 channels, which it reads with two
// 16-byte loads. A group keeps a running softmax for all COLUMNS and strides through the entries of
// its thread block, with the next entries' loads in flight.
#pragma once
#include "args.cuh"

constexpr int THREADS = 128, CHANNELS = 16, TOKENS = 2;

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

// Loads a thread's 16 channels of a row of D: two chunks of 8, so that a group's loads are
// contiguous. Lanes beyond D get zeros.
template <int D>
__device__ __forceinline__ void load(uint4 (&x)[2], const void* row, int lane) {
    const uint4* p = static_cast<const uint4*>(row);
    if (lane < D / CHANNELS) x[0] = p[lane], x[1] = p[D / CHANNELS + lane];
    else x[0] = x[1] = make_uint4(0, 0, 0, 0);
}

// Grid: one thread block for each item of `work`.
template <class Pair, int D, int COLUMNS>
__device__ __forceinline__ void attend(const AttendArgs& a) {
    constexpr int USED = D / CHANNELS, LANES = USED <= 4 ? 4 : USED <= 8 ? 8 : 16, GROUPS = THREADS / LANES;
    __shared__ float outs[GROUPS][COLUMNS][D], maxima[GROUPS][COLUMNS], sums[GROUPS][COLUMNS];
    const AttendWork work = a.work[blockIdx.x];
    if (work.queries == 0) return;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int columns = a.heads_per_kv * work.queries;

    float q[COLUMNS][CHANNELS], acc[COLUMNS][CHANNELS], top[COLUMNS], sum[COLUMNS];
    int seen_from[COLUMNS], seen_to[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int column = min(work.first_column + c, columns - 1);  // Columns beyond the last repeat it.
        const int query = column % work.queries, head = work.kv_head * a.heads_per_kv + column / work.queries;
        uint4 x[2];
        load<D>(x, static_cast<const __half*>(a.q) + ((long long)(work.first_token + query) * a.heads + head) * D, lane);
        widen<Pair>(q[c], x);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) q[c][i] *= a.scale, acc[c][i] = 0.f;
        top[c] = -INFINITY, sum[c] = 0.f;
        seen_to[c] = a.causal ? work.len - work.queries + 1 + query : work.len;
        seen_from[c] = a.causal && a.window ? seen_to[c] - a.window : 0;
    }

    const int end = work.to;
    // Addresses are read one step before the entries.
    const __half* rows[TOKENS];
    auto find = [&](int t) {
#pragma unroll
        for (int u = 0; u < TOKENS; u++) {
            const int place = min(t + u * GROUPS, end - 1);
            const int entry = work.entries ? work.entries[place] : place;
            rows[u] = reinterpret_cast<const __half*>(work.table[entry / PAGE]) + entry % PAGE * D;
        }
    };
    uint4 k[TOKENS][2], v[TOKENS][2], next_k[TOKENS][2], next_v[TOKENS][2];
    auto fetch = [&]() {
#pragma unroll
        for (int u = 0; u < TOKENS; u++) load<D>(next_k[u], rows[u], lane), load<D>(next_v[u], rows[u] + PAGE * D, lane);
    };
    constexpr int STEP = TOKENS * GROUPS;
    if (work.from + group < end) {
        find(work.from + group);
        fetch();
        find(work.from + group + STEP);
    }
    // All lanes of a group take the same path; `group_mask` is the group's lanes.
    const unsigned group_mask = ((1u << LANES) - 1) << (threadIdx.x % 32 / LANES * LANES);
    for (int t = work.from + group; t < end; t += STEP) {
#pragma unroll
        for (int u = 0; u < TOKENS; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) k[u][i] = next_k[u][i], v[u][i] = next_v[u][i];
        if (t + STEP < end) {
            fetch();
            find(t + 2 * STEP);
        }
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
                s[u][c] = token < end && token >= seen_from[c] && token < seen_to[c] ? dot * LOG2E : -INFINITY;
            }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            float higher = top[c];
#pragma unroll
            for (int u = 0; u < TOKENS; u++) higher = fmaxf(higher, s[u][c]);
            if (higher == -INFINITY) continue;  // No visible entry so far.
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
            // Rows of a block after its last entry are undefined; columns of other heads are not
            // read.
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

    // Join the groups of the thread block.
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        if (lane == 0) maxima[group][c] = top[c], sums[group][c] = sum[c];
        if (lane < USED)
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) outs[group][c][(i / 8 * USED + lane) * 8 + i % 8] = acc[c][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS * D; i += THREADS) {
        const int c = i / D, channel = i % D;
        if (work.first_column + c >= columns) break;
        float highest = maxima[0][c], whole = 0.f, value = 0.f;
        for (int g = 1; g < GROUPS; g++) highest = fmaxf(highest, maxima[g][c]);
        for (int g = 0; g < GROUPS && highest > -INFINITY; g++) {
            const float factor = exp2f(maxima[g][c] - highest);
            whole = fmaf(sums[g][c], factor, whole), value = fmaf(outs[g][c][channel], factor, value);
        }
        const long long at = (long long)work.part * COLUMNS + c;
        a.part_out[at * D + channel] = value;
        if (channel == 0) a.part_max[at] = highest, a.part_sum[at] = whole;
    }
}

// Grid: (merges, columns). One thread for each channel, in whole warps. A warp loads the weights of
// 32 parts at a time, one per lane.
__device__ __forceinline__ void merge(const AttendArgs& a) {
    const AttendMerge& merge = a.merges[blockIdx.x];
    const int column = merge.first_column + blockIdx.y, d = a.head_dim, channel = threadIdx.x, lane = threadIdx.x % 32;
    if (column >= a.heads_per_kv * merge.queries) return;
    const long long first = (long long)merge.first_part * a.columns + blockIdx.y;
    float highest = -INFINITY, whole = 0.f, value = 0.f;
    for (int s = lane; s < merge.parts; s += 32) highest = fmaxf(highest, a.part_max[first + (long long)s * a.columns]);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
    // Threads beyond the last channel repeat it.
    const float* outs = a.part_out + first * d + min(channel, d - 1);
    for (int start = 0; start < merge.parts && highest > -INFINITY; start += 32) {
        const long long at = first + (long long)(start + lane) * a.columns;
        const float weight = start + lane < merge.parts ? exp2f(a.part_max[at] - highest) : 0.f;
        if (start + lane < merge.parts) whole = fmaf(a.part_sum[at], weight, whole);
        const int count = min(32, merge.parts - start);
#pragma unroll 8
        for (int s = 0; s < count; s++) value = fmaf(outs[(long long)(start + s) * a.columns * d], __shfl_sync(~0u, weight, s), value);
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) whole += __shfl_xor_sync(~0u, whole, i);
    if (channel >= d) return;
    const int token = merge.first_token + column % merge.queries, head = merge.kv_head * a.heads_per_kv + column / merge.queries;
    const long long row = (long long)token * a.heads + head;
    a.out[row * d + channel] = whole > 0.f ? value / whole : 0.f;
    if (channel == 0) a.lse[row] = whole > 0.f ? (highest + log2f(whole)) / LOG2E : -INFINITY;
}

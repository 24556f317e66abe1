// RWKV-7's recurrence (Peng and others, arXiv 2503.14456) for prompts: the generalised delta rule, with what the layer does to its keys.
//
// A block takes VALUES of a head's values through all tokens; four threads share a column's 64 keys, which stay in registers. What is the same
// for all columns (decays, removal keys, keys, what is added) is computed once per block, a tile of tokens at a time, while the
// next tile is on its way.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int DELTA_THREADS = 128, DELTA_TILE = 16, DELTA_VALUES = 32, DELTA_DIM = 64;

// Grid (DELTA_DIM / DELTA_VALUES, heads, batch), DELTA_THREADS threads.
template <class T>
__device__ void wkv7(const Wkv7& p) {
    constexpr int WARPS = DELTA_THREADS / 32, ROWS = DELTA_TILE / WARPS, QUADS = DELTA_DIM / 16;
    __shared__ float4 rs[DELTA_TILE][DELTA_DIM / 4], ws[DELTA_TILE][DELTA_DIM / 4], ks[DELTA_TILE][DELTA_DIM / 4];
    __shared__ float4 removals[DELTA_TILE][DELTA_DIM / 4], adds[DELTA_TILE][DELTA_DIM / 4];
    __shared__ float vs[DELTA_TILE][DELTA_VALUES], ys[DELTA_TILE][DELTA_VALUES];

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = lane / 8, column = warp * 8 + lane % 8;
    const int head = blockIdx.y * DELTA_DIM, first = head + blockIdx.x * DELTA_VALUES;
    const long long start = (long long)blockIdx.z * p.tokens;
    float* state = p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * DELTA_DIM * DELTA_DIM + blockIdx.x * DELTA_VALUES + column;

    // Keys 4 (part + 4 m) + e.
    float s[QUADS][4];
#pragma unroll
    for (int m = 0; m < QUADS; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[m][e] = state[(4 * (part + 4 * m) + e) * DELTA_DIM];
    }
    // Of every ROWS-th row of a tile, a warp prepares all keys, a lane two neighbours.
    auto pair_of = [&](const float* x) { return *reinterpret_cast<const float2*>(x + head + 2 * lane); };
    const float2 decay = pair_of(p.decay), rate_bias = pair_of(p.rate_bias), removal_scale = pair_of(p.removal_scale);
    const float2 key_rate = pair_of(p.key_rate), own_scale = pair_of(p.own_scale);
    Bits<T> r_next[ROWS], key_next[ROWS], w_next[ROWS], a_next[ROWS];
    T v_next[ROWS];
    auto load = [&](int tile) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const long long row = start + min(tile + warp * ROWS + i, p.tokens - 1);
            auto at = [&](const void* x, int stride) { return *reinterpret_cast<const Bits<T>*>((const T*)x + row * stride + head + 2 * lane); };
            r_next[i] = at(p.r, p.r_row), key_next[i] = at(p.key, p.key_row), w_next[i] = at(p.w, p.w_row), a_next[i] = at(p.a, p.a_row);
            v_next[i] = ((const T*)p.v)[row * p.v_row + first + lane];
        }
    };
    auto prepare = [&](int tile) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int t = warp * ROWS + i;
            const float2 r = unpacked<T>(r_next[i]), key = unpacked<T>(key_next[i]), w = unpacked<T>(w_next[i]), a = unpacked<T>(a_next[i]);
            float2 removal = {key.x * removal_scale.x, key.y * removal_scale.y};
            const float2 rate = {sigmoid(a.x + rate_bias.x), sigmoid(a.y + rate_bias.y)};
            const float2 k = {key.x * fmaf(rate.x - 1.f, key_rate.x, 1.f), key.y * fmaf(rate.y - 1.f, key_rate.y, 1.f)};
            float norm = fmaf(removal.x, removal.x, removal.y * removal.y);
            float own = fmaf(r.x * k.x, own_scale.x, r.y * k.y * own_scale.y);
#pragma unroll
            for (int step = 1; step < 32; step *= 2) norm += __shfl_xor_sync(~0u, norm, step), own += __shfl_xor_sync(~0u, own, step);
            const float scale = 1.f / fmaxf(sqrtf(norm), 1e-12f);
            removal.x *= scale, removal.y *= scale;
            auto put = [&](float4(&to)[DELTA_TILE][DELTA_DIM / 4], float x, float y) { ((float2*)to[t])[lane] = make_float2(x, y); };
            put(rs, r.x, r.y), put(ks, k.x, k.y), put(removals, removal.x, removal.y);
            put(ws, forget7(w.x + decay.x), forget7(w.y + decay.y)), put(adds, -rate.x * removal.x, -rate.y * removal.y);
            vs[t][lane] = number(v_next[i]);
            if (p.own && blockIdx.x == 0 && lane == 0 && tile + t < p.tokens) p.own[(start + tile + t) * p.heads + blockIdx.y] = own;
        }
    };
    // The removal keys of the token to come are there before it; all its other numbers before what they are needed for is known.
    float4 removal[QUADS];
    auto load_removal = [&](int t) {
#pragma unroll
        for (int m = 0; m < QUADS; m++) removal[m] = removals[t][part + 4 * m];
    };
    auto step = [&](int t) {
        const float v = vs[t][column];
        float sum[QUADS];
#pragma unroll
        for (int m = 0; m < QUADS; m++) {
            sum[m] = fmaf(s[m][3], removal[m].w, fmaf(s[m][2], removal[m].z, fmaf(s[m][1], removal[m].y, s[m][0] * removal[m].x)));
        }
        float4 w4[QUADS], k4[QUADS], add4[QUADS], r4[QUADS];
#pragma unroll
        for (int m = 0; m < QUADS; m++) w4[m] = ws[t][part + 4 * m], k4[m] = ks[t][part + 4 * m], add4[m] = adds[t][part + 4 * m], r4[m] = rs[t][part + 4 * m];
        load_removal(min(t + 1, DELTA_TILE - 1));
        float found = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        found += __shfl_xor_sync(~0u, found, 8);
#pragma unroll
        for (int m = 0; m < QUADS; m++) {
            s[m][0] = fmaf(w4[m].x, s[m][0], k4[m].x * v), s[m][1] = fmaf(w4[m].y, s[m][1], k4[m].y * v);
            s[m][2] = fmaf(w4[m].z, s[m][2], k4[m].z * v), s[m][3] = fmaf(w4[m].w, s[m][3], k4[m].w * v);
        }
        found += __shfl_xor_sync(~0u, found, 16);
#pragma unroll
        for (int m = 0; m < QUADS; m++) {
            s[m][0] = fmaf(add4[m].x, found, s[m][0]), s[m][1] = fmaf(add4[m].y, found, s[m][1]);
            s[m][2] = fmaf(add4[m].z, found, s[m][2]), s[m][3] = fmaf(add4[m].w, found, s[m][3]);
            sum[m] = fmaf(s[m][3], r4[m].w, fmaf(s[m][2], r4[m].z, fmaf(s[m][1], r4[m].y, s[m][0] * r4[m].x)));
        }
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    };

    load(0);
    for (int tile = 0; tile < p.tokens; tile += DELTA_TILE) {
        const int count = min(DELTA_TILE, p.tokens - tile);
        prepare(tile);
        __syncthreads();
        if (tile + DELTA_TILE < p.tokens) load(tile + DELTA_TILE);
        load_removal(0);
        int t = 0;
        for (; t + 4 <= count; t += 4) {
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = step(t + i);
            ys[t + part][column] = sums_of_lanes<4, 8>(sums, lane);
        }
        for (; t < count; t++) {
            float sum = step(t);
            sum += __shfl_xor_sync(~0u, sum, 8);
            sum += __shfl_xor_sync(~0u, sum, 16);
            ys[t][column] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int t = warp * ROWS + i;
            if (t < count) ((T*)p.y)[(start + tile + t) * p.y_row + first + lane] = rounded<T>(ys[t][lane]);
        }
    }
#pragma unroll
    for (int m = 0; m < QUADS; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) state[(4 * (part + 4 * m) + e) * DELTA_DIM] = s[m][e];
    }
}

}  // namespace hybrid

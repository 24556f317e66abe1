// Mamba's selective scan (Gu and Dao, arXiv 2312.00752) for 16 states, prefill and decode:
//
//     h <- exp(dt A) h + dt B u,  y = (C h + D u) silu(z),  dt = softplus(steps + bias)
//
// A block takes CHANNELS channels through all tokens, a tile of them at a time. One half of its warps keeps the states in registers, four to a
// lane; the other half computes what depends on no state (dt, the gate) for the tile after, finishes the outputs of the tile before, and
// has the loads of the tile after the next on their way. Lanes of a quarter warp have the same four states of eight channels, so
// that reading B and C takes no more than one access for all.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int STATES = 16, SCAN_CHANNELS = 16, SCAN_TILE = 32, SCAN_LANES = 4, SCAN_SIDE = SCAN_CHANNELS * SCAN_LANES, SCAN_THREADS = 2 * SCAN_SIDE;
constexpr int SCAN_BLOCKS = 5;  // On a multiprocessor.

constexpr int SUMS_ROW = SCAN_CHANNELS + 8;  // So that four rows of eight lie in different banks.

struct ScanShared {
    float4 inputs[2][SCAN_TILE][SCAN_CHANNELS / 2];  // dt and dt u of two channels
    float4 b[2][SCAN_TILE][SCAN_LANES], c[2][SCAN_TILE][SCAN_LANES];
    float sums[2][SCAN_TILE][SUMS_ROW];  // C h
};

template <class T, bool PAIRED>
struct ScanMaker {
    static constexpr int PAIRS = SCAN_CHANNELS / 2, STEP = SCAN_SIDE / PAIRS, ITEMS = SCAN_TILE / STEP;  // A thread takes every STEP-th token of a pair of channels,
    static constexpr int HALVES = STATES / 2, SELECT_STEP = SCAN_SIDE / HALVES, SELECTED = SCAN_TILE / SELECT_STEP;  // and of a pair of states.

    const SelectiveScan& p;
    ScanShared& shared;
    const int thread, first;
    const bool used, second;
    int channel, next;
    float2 d, bias;
    const T *u_at, *steps_at, *z_at, *b_at, *c_at;  // Of this thread's first token of the tile to load
    T* y_at;                                        // Of that of the tile to finish
    Bits<T> steps[ITEMS], b[SELECTED], c[SELECTED];
    // Of the tile that is loaded, the one the states pass over, and the one to finish.
    Bits<T> u[3][ITEMS], z[3][ITEMS];

    __device__ ScanMaker(const SelectiveScan& p, ScanShared& shared)
        : p(p), shared(shared), thread(threadIdx.x - SCAN_SIDE), first(blockIdx.x * SCAN_CHANNELS + thread % PAIRS * 2), used(first < p.channels),
          second(first + 1 < p.channels) {
        channel = min(first, p.channels - (PAIRED ? 2 : 1)), next = second ? channel + 1 : channel;
        d = make_float2(p.d[channel], p.d[next]), bias = make_float2(p.bias[channel], p.bias[next]);
        const long long start = (long long)blockIdx.y * p.tokens, row = start + thread / PAIRS, selected = start + thread / HALVES;
        u_at = (const T*)p.u + row * p.u_row + channel, steps_at = (const T*)p.steps + row * p.steps_row + channel;
        z_at = (const T*)p.z + row * p.z_row + channel, y_at = (T*)p.y + row * p.y_row + first;
        b_at = (const T*)p.b + selected * p.b_row + thread % HALVES * 2, c_at = (const T*)p.c + selected * p.c_row + thread % HALVES * 2;
    }

    // N rows, `step` apart; no more than `count` of them. Moves on to the next tile's.
    template <int N>
    __device__ void rows(const T*& at, int row, int step, int to_next, int count, Bits<T> (&to)[N]) {
        const T* from = at;
#pragma unroll
        for (int i = 0; i < N; i++) {
            to[i] = i * step < count ? pair_of<PAIRED>(from, from + to_next) : packed<T>(0.f, 0.f);
            from += step * row;
        }
        at = from;
    }
    __device__ void load(int tile) {
        const int count = p.tokens - tile * SCAN_TILE - thread / PAIRS, selected = p.tokens - tile * SCAN_TILE - thread / HALVES;
        rows(u_at, p.u_row, STEP, next - channel, count, u[0]);
        rows(steps_at, p.steps_row, STEP, next - channel, count, steps);
        if (p.z) rows(z_at, p.z_row, STEP, next - channel, count, z[0]);
        rows(b_at, p.b_row, SELECT_STEP, 1, selected, b);
        rows(c_at, p.c_row, SELECT_STEP, 1, selected, c);
    }
    __device__ void make(int tile) {
        const int stage = tile % 2, count = p.tokens - tile * SCAN_TILE - thread / PAIRS;
        float4* inputs = &shared.inputs[stage][thread / PAIRS][thread % PAIRS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const float2 us = unpacked<T>(u[0][i]), in = unpacked<T>(steps[i]);
            float2 dt = {softplus(in.x + bias.x), softplus(in.y + bias.y)};
            if (i * STEP >= count) dt = make_float2(0.f, 0.f);  // A token beyond the last leaves the states as they are.
            inputs[i * STEP * PAIRS] = make_float4(dt.x, dt.x * us.x, dt.y, dt.y * us.y);
            u[2][i] = u[1][i], u[1][i] = u[0][i];
            z[2][i] = z[1][i], z[1][i] = z[0][i];
        }
        float2* to_b = (float2*)shared.b[stage][thread / HALVES] + thread % HALVES;
        float2* to_c = (float2*)shared.c[stage][thread / HALVES] + thread % HALVES;
#pragma unroll
        for (int i = 0; i < SELECTED; i++) {
            to_b[i * SELECT_STEP * HALVES] = unpacked<T>(b[i]), to_c[i * SELECT_STEP * HALVES] = unpacked<T>(c[i]);
        }
    }
    // Outputs of a tile. AGE: of its u and z, 1 for the last tile made and 2 for the one before.
    template <int AGE>
    __device__ void finish(int tile) {
        const int count = p.tokens - tile * SCAN_TILE - thread / PAIRS;
        const float* sums = &shared.sums[tile % 2][thread / PAIRS][thread % PAIRS * 2];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const float2 sum = *(const float2*)(sums + i * STEP * SUMS_ROW), us = unpacked<T>(u[AGE][i]);
            float y[2] = {fmaf(d.x, us.x, sum.x), fmaf(d.y, us.y, sum.y)};
            if (p.z) {
                const float2 zs = unpacked<T>(z[AGE][i]);
                y[0] *= silu(zs.x), y[1] *= silu(zs.y);
            }
            if (used && i * STEP < count) {
                if (PAIRED) {
                    *reinterpret_cast<Bits<T>*>(y_at) = packed<T>(y[0], y[1]);
                } else {
                    y_at[0] = rounded<T>(y[0]);
                    if (second) y_at[1] = rounded<T>(y[1]);
                }
            }
            y_at += STEP * p.y_row;
        }
    }
};

// Grid (channels / SCAN_CHANNELS rounded up, batch), SCAN_THREADS threads.
template <class T, bool PAIRED>
__device__ void selective_scan_channels(const SelectiveScan& p, ScanShared& shared) {
    const int tiles = (p.tokens + SCAN_TILE - 1) / SCAN_TILE;
    auto barrier = [] { asm volatile("bar.sync 0;" ::: "memory"); };
    if (threadIdx.x >= SCAN_SIDE) {
        ScanMaker<T, PAIRED> maker(p, shared);
        maker.load(0);
        maker.make(0);
        if (tiles > 1) maker.load(1);
        for (int tile = 0; tile < tiles; tile++) {
            barrier();
            if (tile > 0) maker.template finish<2>(tile - 1);
            if (tile + 1 < tiles) maker.make(tile + 1);
            if (tile + 2 < tiles) maker.load(tile + 2);
        }
        barrier();
        maker.template finish<1>(tiles - 1);
        return;
    }
    constexpr int N = STATES / SCAN_LANES;
    const int lane = threadIdx.x % 32, part = lane / 8, own = threadIdx.x / 32 * 8 + lane % 8, channel = blockIdx.x * SCAN_CHANNELS + own;
    const bool used = channel < p.channels;
    float4* state = (float4*)(p.state + ((long long)blockIdx.y * p.channels + (used ? channel : 0)) * STATES) + part;
    const float4 start = *state, as = ((const float4*)p.a)[(long long)(used ? channel : 0) * SCAN_LANES + part];
    const float a[N] = {as.x * LOG2_E, as.y * LOG2_E, as.z * LOG2_E, as.w * LOG2_E};
    float h[N] = {start.x, start.y, start.z, start.w};
    for (int tile = 0; tile < tiles; tile++) {
        barrier();
        const int stage = tile % 2, count = min(SCAN_TILE, p.tokens - tile * SCAN_TILE);
        for (int from = 0; from < count; from += 2 * SCAN_LANES) {
            float sums[2][SCAN_LANES];
#pragma unroll
            for (int i = 0; i < 2 * SCAN_LANES; i++) {
                const float2 in = ((const float2*)shared.inputs[stage][from + i])[own];
                const float4 b = shared.b[stage][from + i][part], c = shared.c[stage][from + i][part];
                h[0] = fmaf(exp2_of(in.x * a[0]), h[0], in.y * b.x), h[1] = fmaf(exp2_of(in.x * a[1]), h[1], in.y * b.y);
                h[2] = fmaf(exp2_of(in.x * a[2]), h[2], in.y * b.z), h[3] = fmaf(exp2_of(in.x * a[3]), h[3], in.y * b.w);
                sums[i / SCAN_LANES][i % SCAN_LANES] = fmaf(h[3], c.w, fmaf(h[2], c.z, fmaf(h[1], c.y, h[0] * c.x)));
            }
            shared.sums[stage][from + part][own] = sums_of_lanes<SCAN_LANES, 8>(sums[0], lane);
            shared.sums[stage][from + SCAN_LANES + part][own] = sums_of_lanes<SCAN_LANES, 8>(sums[1], lane);
        }
    }
    barrier();
    if (used) *state = make_float4(h[0], h[1], h[2], h[3]);
}

template <class T>
__device__ void selective_scan(const SelectiveScan& p) {
    __shared__ ScanShared shared;
    const size_t pair = 2 * sizeof(T) - 1;
    const size_t pointers = (size_t)p.u | (size_t)p.steps | (size_t)p.z | (size_t)p.b | (size_t)p.c | (size_t)p.y;
    const int rows = p.u_row | p.steps_row | (p.z ? p.z_row : 0) | p.b_row | p.c_row | p.y_row | p.channels;
    if ((pointers & pair) == 0 && rows % 2 == 0) selective_scan_channels<T, true>(p, shared);
    else selective_scan_channels<T, false>(p, shared);
}

}  // namespace hybrid

// Mamba's selective scan (Gu and Dao, arXiv 2312.00752) for 16 states, prefill and decode:
//
//     h <- exp(dt A) h + dt B u,  y = (C h + D u) silu(z),  dt = softplus(steps + bias)
//
// A block processes some channels of all tokens, a tile of tokens at a time:
//
// 1. Each thread computes dt and dt u, which do not depend on the state, for two channels of four
//    tokens (a quad). The loads of the next tile are in flight meanwhile.
// 2. LANES lanes share a channel, each with some of its states in registers, and process the quads
//    in order.
// 3. Each thread sums the lanes' terms of C h for its four tokens.
//
// All data except the states passes through shared memory in quads, so that one access has four
// tokens. Blocks of one warp, which need no barriers, take 1.7 times as long if there are many
// (H100).
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int STATES = 16;

// WARPS: warps of a block. LANES: lanes that share a channel. LANES is even, so that pairs of lanes
// read the same dt, and the pairs of every second lane the same B and C, which halves the time of
// such accesses.
template <int WARPS, int OF_LANES>
struct ScanShape {
    // OWN: states per lane; WARP: channels per warp
    static constexpr int LANES = OF_LANES, THREADS = 32 * WARPS, OWN = STATES / LANES, WARP = 32 / LANES;
    static constexpr int CHANNELS = WARPS * WARP, PAIRS = CHANNELS / 2, QUADS = THREADS / PAIRS, TILE = 4 * QUADS;
    // Threads that load four tokens of two states of B or C
    static constexpr int SELECTING = STATES * QUADS;
    static_assert(LANES % 2 == 0 && THREADS % PAIRS == 0 && SELECTING <= THREADS);

    struct Quad {
        // in: dt u. Even channels and states come first.
        float4 dt[CHANNELS], in[CHANNELS], b[STATES], c[STATES];
        // The lanes' terms of C h. + 4: pairs of lanes write to different banks.
        float4 sums[LANES][CHANNELS + 4];
    };
    struct Shared {
        Quad quads[QUADS];
    };
};
typedef ScanShape<4, 4> ScanUsual;
// More warps per channel: a multiprocessor has one block, which is bound by latency.
typedef ScanShape<10, 8> ScanFew;
static_assert(sizeof(ScanUsual::Shared) == SCAN_SHARED && sizeof(ScanFew::Shared) == SCAN_FEW_SHARED, "as args.cuh says");
constexpr int SCAN_BLOCKS = 4;  // Per multiprocessor; ScanFew: 1.

// Returns log(1 + e^x) = max(x, 0) + log(1 + e^-|x|) with a relative error of 3e-7. A polynomial,
// because the kernel is bound by special functions.
__device__ __forceinline__ float scan_softplus(float x) {
    const float e = exp2_of(-LOG2_E * fabsf(x));
    float y = fmaf(e, -0.00853921007f, 0.044089634f);
    y = fmaf(e, y, -0.107681714f), y = fmaf(e, y, 0.177452415f), y = fmaf(e, y, -0.244954631f);
    y = fmaf(e, y, 0.332754791f), y = fmaf(e, y, -0.499974042f), y = fmaf(e, y, 0.999999821f);
    return fmaf(e, y, fmaxf(x, 0.f));
}
// Returns sigmoid(x) x of two numbers with one reciprocal. Exponents are limited to 62, because the
// product would overflow; there silu is 0 in f16 and below 1e-17 |x|.
__device__ __forceinline__ float2 scan_silu(float2 x) {
    const float px = 1.f + exp2_of(fminf(-LOG2_E * x.x, 62.f)), py = 1.f + exp2_of(fminf(-LOG2_E * x.y, 62.f));
    const float inv = inverse(px * py);
    return make_float2(x.x * (py * inv), x.y * (px * inv));
}
__device__ __forceinline__ float4 four(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }

// The work on four tokens of two channels before and after the states. WHOLE: the tile has no
// tokens beyond the last.
template <class S, class T, bool PAIRED>
struct ScanEnds {
    const SelectiveScan& p;
    typename S::Shared& shared;
    const int thread, pair, quad, first;
    const bool used, second;
    int channel, next;
    float2 d, bias;
    const T *u_at, *steps_at, *z_at, *selected_at;  // This thread's first token of the tile to load
    int selected_row, selected_quad, selected_to;
    T* y_at;                                      // The same of the tile to finish
    Bits<T> u[4], steps[4], z[4], selected[4];  // Of the next tile
    Bits<T> us[4], zs[4];                         // Of the current tile

    __device__ ScanEnds(const SelectiveScan& p, typename S::Shared& shared)
        : p(p), shared(shared), thread(threadIdx.x), pair(thread % S::PAIRS), quad(thread / S::PAIRS), first(blockIdx.x * S::CHANNELS + pair * 2),
          used(first < p.channels), second(first + 1 < p.channels) {
        channel = min(first, p.channels - (PAIRED ? 2 : 1)), next = second ? channel + 1 : channel;
        d = make_float2(p.d[channel], p.d[next]), bias = make_float2(p.bias[channel], p.bias[next]);
        const long long start = (long long)blockIdx.y * p.tokens, row = start + 4 * quad;
        u_at = (const T*)p.u + row * p.u_row + channel, steps_at = (const T*)p.steps + row * p.steps_row + channel;
        z_at = (const T*)p.z + row * p.z_row + channel, y_at = (T*)p.y + row * p.y_row + first;
        constexpr int HALF = STATES / 2;
        const bool of_c = thread / HALF % 2;
        selected_quad = thread / STATES, selected_row = of_c ? p.c_row : p.b_row;
        selected_at = (const T*)(of_c ? p.c : p.b) + (start + 4 * selected_quad) * selected_row + thread % HALF * 2;
        selected_to = (of_c ? STATES : 0) + thread % HALF;
    }
    __device__ bool selects() { return S::SELECTING == S::THREADS || selected_quad < S::QUADS; }

    template <bool WHOLE>
    __device__ void rows(const T* at, int row, int to_next, int count, Bits<T> (&to)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const T* from = at + (long long)i * row;
            to[i] = WHOLE || i < count ? pair_of<PAIRED>(from, from + to_next) : packed<T>(0.f, 0.f);
        }
    }
    template <bool WHOLE>
    __device__ void load(int tile) {
        const int left = p.tokens - tile * S::TILE, count = left - 4 * quad;
        rows<WHOLE>(u_at, p.u_row, next - channel, count, u);
        rows<WHOLE>(steps_at, p.steps_row, next - channel, count, steps);
        if (p.z) rows<WHOLE>(z_at, p.z_row, next - channel, count, z);
        u_at += S::TILE * (long long)p.u_row, steps_at += S::TILE * (long long)p.steps_row, z_at += S::TILE * (long long)p.z_row;
        if (selects()) rows<WHOLE>(selected_at, selected_row, 1, left - 4 * selected_quad, selected);
        selected_at += S::TILE * (long long)selected_row;
    }
    template <bool WHOLE>
    __device__ void produce(int tile) {
        const int count = p.tokens - tile * S::TILE - 4 * quad;
        float dt[2][4], in[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 one = unpacked<T>(u[i]), step = unpacked<T>(steps[i]);
            dt[0][i] = scan_softplus(step.x + bias.x), dt[1][i] = scan_softplus(step.y + bias.y);
            // Tokens beyond the last leave the states unchanged.
            if (!WHOLE && i >= count) dt[0][i] = dt[1][i] = 0.f;
            in[0][i] = dt[0][i] * one.x, in[1][i] = dt[1][i] * one.y;
        }
        typename S::Quad& to = shared.quads[quad];
        to.dt[pair] = four(dt[0]), to.dt[S::PAIRS + pair] = four(dt[1]);
        to.in[pair] = four(in[0]), to.in[S::PAIRS + pair] = four(in[1]);
        if (selects()) {
            float s[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 one = unpacked<T>(selected[i]);
                s[0][i] = one.x, s[1][i] = one.y;
            }
            float4* of_state = shared.quads[selected_quad].b + selected_to;
            of_state[0] = four(s[0]), of_state[STATES / 2] = four(s[1]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) us[i] = u[i], zs[i] = z[i];
    }
    __device__ float4 sum_of(int place) {
        const typename S::Quad& from = shared.quads[quad];
        float4 y = from.sums[0][place];
#pragma unroll
        for (int i = 1; i < S::LANES; i++) {
            const float4 x = from.sums[i][place];
            y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
        }
        return y;
    }
    template <bool WHOLE>
    __device__ void finish(int tile) {
        const int count = p.tokens - tile * S::TILE - 4 * quad;
        if (used) {
            const float4 s[2] = {sum_of(pair), sum_of(S::PAIRS + pair)};
            float y[2][4] = {{s[0].x, s[0].y, s[0].z, s[0].w}, {s[1].x, s[1].y, s[1].z, s[1].w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 one = unpacked<T>(us[i]);
                y[0][i] = fmaf(d.x, one.x, y[0][i]), y[1][i] = fmaf(d.y, one.y, y[1][i]);
            }
            if (p.z) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 gate = scan_silu(unpacked<T>(zs[i]));
                    y[0][i] *= gate.x, y[1][i] *= gate.y;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!WHOLE && i >= count) break;
                T* to = y_at + (long long)i * p.y_row;
                if (PAIRED) {
                    *reinterpret_cast<Bits<T>*>(to) = packed<T>(y[0][i], y[1][i]);
                } else {
                    to[0] = rounded<T>(y[0][i]);
                    if (second) to[1] = rounded<T>(y[1][i]);
                }
            }
        }
        y_at += S::TILE * (long long)p.y_row;
    }
};

// Grid (channels / CHANNELS rounded up, batch), THREADS threads, sizeof(Shared) bytes of dynamic
// shared memory.
template <class S, class T, bool PAIRED>
__device__ void selective_scan_channels(const SelectiveScan& p, typename S::Shared& shared) {
    constexpr int N = S::OWN;
    const int tiles = (p.tokens + S::TILE - 1) / S::TILE, whole = p.tokens / S::TILE;
    ScanEnds<S, T, PAIRED> ends(p, shared);
    auto load = [&](int tile) { tile < whole ? ends.template load<true>(tile) : ends.template load<false>(tile); };
    load(0);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part = lane % 2 + lane / 2 / S::WARP * 2, place = warp * S::WARP + lane / 2 % S::WARP;
    const int channel = blockIdx.x * S::CHANNELS + place % S::PAIRS * 2 + place / S::PAIRS;
    const bool used = channel < p.channels;
    auto state_of = [&](int k) { return (part * N + k) % (STATES / 2) * 2 + (part * N + k) / (STATES / 2); };
    float* state = p.state + ((long long)blockIdx.y * p.channels + channel) * STATES;
    float a[N], h[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
        a[k] = used ? p.a[(long long)channel * STATES + state_of(k)] * LOG2_E : 0.f, h[k] = used ? state[state_of(k)] : 0.f;
    }
    for (int tile = 0; tile < tiles; tile++) {
        __syncthreads();
        tile < whole ? ends.template produce<true>(tile) : ends.template produce<false>(tile);
        if (tile + 1 < tiles) load(tile + 1);
        __syncthreads();
        const int quads = min(S::QUADS, (p.tokens - tile * S::TILE + 3) / 4);
        auto pass = [&](int quad) {
            typename S::Quad& at = shared.quads[quad];
            const float4 dt = at.dt[place], in = at.in[place];
            float4 sum;
#pragma unroll
            for (int k = 0; k < N; k++) {
                const float4 b = at.b[part * N + k], c = at.c[part * N + k];
                h[k] = fmaf(exp2_of(dt.x * a[k]), h[k], in.x * b.x), sum.x = k ? fmaf(h[k], c.x, sum.x) : h[k] * c.x;
                h[k] = fmaf(exp2_of(dt.y * a[k]), h[k], in.y * b.y), sum.y = k ? fmaf(h[k], c.y, sum.y) : h[k] * c.y;
                h[k] = fmaf(exp2_of(dt.z * a[k]), h[k], in.z * b.z), sum.z = k ? fmaf(h[k], c.z, sum.z) : h[k] * c.z;
                h[k] = fmaf(exp2_of(dt.w * a[k]), h[k], in.w * b.w), sum.w = k ? fmaf(h[k], c.w, sum.w) : h[k] * c.w;
            }
            at.sums[part][place] = sum;
        };
        if (S::QUADS <= 8 && quads == S::QUADS) {
#pragma unroll
            for (int quad = 0; quad < S::QUADS; quad++) pass(quad);
        } else {
#pragma unroll 2
            for (int quad = 0; quad < quads; quad++) pass(quad);
        }
        __syncthreads();
        tile < whole ? ends.template finish<true>(tile) : ends.template finish<false>(tile);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (used) state[state_of(k)] = h[k];
    }
}

template <class S, class T>
__device__ void selective_scan_shape(const SelectiveScan& p) {
    extern __shared__ __align__(16) char scan_bytes[];
    typename S::Shared& shared = *(typename S::Shared*)scan_bytes;
    const size_t pair = 2 * sizeof(T) - 1;
    const size_t pointers = (size_t)p.u | (size_t)p.steps | (size_t)p.z | (size_t)p.b | (size_t)p.c | (size_t)p.y;
    const int rows = p.u_row | p.steps_row | (p.z ? p.z_row : 0) | p.b_row | p.c_row | p.y_row | p.channels;
    if ((pointers & pair) == 0 && rows % 2 == 0) selective_scan_channels<S, T, true>(p, shared);
    else selective_scan_channels<S, T, false>(p, shared);
}
template <class T>
__device__ void selective_scan(const SelectiveScan& p) { selective_scan_shape<ScanUsual, T>(p); }
template <class T>
__device__ void selective_scan_few(const SelectiveScan& p) { selective_scan_shape<ScanFew, T>(p); }

}  // namespace hybrid

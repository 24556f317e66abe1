// The real-gated linear recurrence of Griffin (De and others, arXiv 2402.19427), prefill and decode, in one pass over memory:
//
//     a = e^(decay sigmoid(r)),  h <- a h + sqrt(1 - a^2) sigmoid(i) x,  y = h gelu(gate)
//
// A block takes TILE channels through CHUNK tokens, each warp a RUN of them, with a and the new parts of h in registers. What a run does
// to h is h -> A h + H. A chunk publishes its own A and H, and h after it as soon as it knows that. It gets h before it from the h
// LOOK chunks back and what the chunks between do to it, always in this order: results do not depend on timing, and the chain of blocks
// that wait for one another is short.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

#ifndef LRU_RUN_
#define LRU_RUN_ 8
#define LRU_BLOCKS 3
#endif
constexpr int LRU_THREADS = 256, LRU_WARPS = LRU_THREADS / 32, LRU_TILE = 64, LRU_RUN = LRU_RUN_, LRU_CHUNK = LRU_WARPS * LRU_RUN;
constexpr int LRU_LOOK = 8;  // A multiple of LRU_THREADS / LRU_TILE.

// What a chunk publishes.
struct LruChunk {
    float a[LRU_TILE], own[LRU_TILE], h[LRU_TILE];
    int stage;  // 1: a and own are there, 2: h too
    int unused[63];
};
static_assert(sizeof(LruChunk) == 1024, "as args.cuh says");

struct LruScratch {
    unsigned ticket, done;
    unsigned unused[62];
    LruChunk chunks[1];
};

__device__ __forceinline__ int acquired(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void release(int* p, int x) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

// Two neighbours; PAIRED: in one access; otherwise they lie where they may, and the second may be the first.
template <bool PAIRED, class T>
__device__ __forceinline__ Bits<T> pair_of(const T* first, const T* second) {
    if (PAIRED) return *reinterpret_cast<const Bits<T>*>(first);
    return packed<T>(number(*first), number(*second));
}

// a and the new part of h of one token and channel.
__device__ __forceinline__ float2 lru_step(float x, float r, float i, float decay, bool whole) {
    const float a = exp2_of(decay * sigmoid(r));
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fmaf(-a, a, 1.f)));
    return make_float2(a, x * sigmoid(i) * (whole ? 1.f : root));
}

template <class T, bool PAIRED>
__device__ void rg_lru_chunk(const RgLru& p) {
    __shared__ float totals_a[LRU_WARPS][LRU_TILE], totals_h[LRU_WARPS][LRU_TILE];
    __shared__ float look_a[LRU_LOOK][LRU_TILE], look_h[LRU_LOOK][LRU_TILE];
    __shared__ unsigned ticket, last;
    const int tiles = (p.channels + LRU_TILE - 1) / LRU_TILE, chunks = (p.tokens + LRU_CHUNK - 1) / LRU_CHUNK;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    LruScratch* scratch = (LruScratch*)p.scratch;

    // Chunks are taken in the order in which blocks start, so that those a block waits for are on their way.
    if (thread == 0) ticket = chunks > 1 ? atomicInc(&scratch->ticket, gridDim.x - 1) : blockIdx.x;
    __syncthreads();
    const int chunk = ticket / (tiles * p.batch), strand = ticket % (tiles * p.batch), entry = strand / tiles, first = strand % tiles * LRU_TILE;
    const int channel = min(first + 2 * lane, p.channels - (PAIRED ? 2 : 1));
    const bool used = first + 2 * lane < p.channels, second = first + 2 * lane + 1 < p.channels;
    const int start = chunk * LRU_CHUNK + warp * LRU_RUN, count = min(p.tokens - start, LRU_RUN);  // May be negative.

    const long long row = (long long)entry * p.tokens;
    const long long gates = (long long)(channel / p.block) * p.block_stride + channel % p.block;
    const long long gates_second = second ? (long long)((channel + 1) / p.block) * p.block_stride + (channel + 1) % p.block : gates;
    float2 a[LRU_RUN], b[LRU_RUN];
    Bits<T> z[LRU_RUN];
    const int next = second ? channel + 1 : channel;
    {
        auto at = [&](int j) { return row + max(min(start + j, p.tokens - 1), 0); };
        auto gate_of = [&](const void* g, int j) {
            const T* of_row = (const T*)g + at(j) * p.gate_row;
            return pair_of<PAIRED>(of_row + gates, of_row + gates_second);
        };
        auto of = [&](const void* x, int j, int stride) {
            const T* of_row = (const T*)x + at(j) * stride;
            return pair_of<PAIRED>(of_row + channel, of_row + next);
        };
        const float2 r_bias = {p.r_bias[channel], p.r_bias[next]}, i_bias = {p.i_bias[channel], p.i_bias[next]};
        const float2 decay = {p.decay[channel] * LOG2_E, p.decay[next] * LOG2_E};
        constexpr int AHEAD = sizeof(T) == 2 ? LRU_RUN : LRU_RUN / 2;
#pragma unroll
        for (int from = 0; from < LRU_RUN; from += AHEAD) {
            Bits<T> x[AHEAD], r[AHEAD], i[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                x[j] = of(p.x, from + j, p.x_row);
                r[j] = gate_of(p.r, from + j), i[j] = gate_of(p.i, from + j);
            }
            if (p.gate) {
#pragma unroll
                for (int j = from; j < from + AHEAD; j++) z[j] = of(p.gate, j, p.z_row);
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const bool whole = p.first && start + from + j == 0;
                const float2 xs = unpacked<T>(x[j]), rs = unpacked<T>(r[j]), in = unpacked<T>(i[j]);
                const float2 u = lru_step(xs.x, rs.x + r_bias.x, in.x + i_bias.x, decay.x, whole);
                const float2 v = lru_step(xs.y, rs.y + r_bias.y, in.y + i_bias.y, decay.y, whole);
                const bool is = from + j < count;  // A token beyond the last changes nothing.
                a[from + j] = is ? make_float2(u.x, v.x) : make_float2(1.f, 1.f);
                b[from + j] = is ? make_float2(u.y, v.y) : make_float2(0.f, 0.f);
            }
        }
    }
    float2 total = {1.f, 1.f}, h = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < LRU_RUN; j++) {
        total.x *= a[j].x, total.y *= a[j].y;
        h.x = fmaf(a[j].x, h.x, b[j].x), h.y = fmaf(a[j].y, h.y, b[j].y);
    }
    *(float2*)&totals_a[warp][2 * lane] = total, *(float2*)&totals_h[warp][2 * lane] = h;
    __syncthreads();

    // h before the chunk, then before each run of it.
    const int c = thread % LRU_TILE, c_channel = first + c;
    const bool has = c_channel < p.channels;
    float* state = p.state + (long long)entry * p.channels + (has ? c_channel : 0);
    LruChunk* mine = chunks > 1 ? &scratch->chunks[(long long)strand * chunks + chunk] : nullptr;
    float own = 0, all = 1;
    if (thread < LRU_TILE) {
#pragma unroll
        for (int w = 0; w < LRU_WARPS; w++) own = fmaf(totals_a[w][c], own, totals_h[w][c]), all *= totals_a[w][c];
    }
    if (chunks > 1) {
        if (thread < LRU_TILE) mine->a[c] = all, mine->own[c] = own;
        __syncthreads();
        if (thread == 0) __threadfence(), release(&mine->stage, 1);
        for (int back = thread / LRU_TILE; back < min(LRU_LOOK, chunk); back += LRU_THREADS / LRU_TILE) {
            const LruChunk* other = mine - 1 - back;
            const int stage = back == LRU_LOOK - 1 || back == chunk - 1 ? 2 : 1;
            if (lane == 0) {
                while (acquired(&other->stage) < stage) __nanosleep(20);
            }
            __syncwarp();
            look_a[back][c] = __ldcg(&other->a[c]);
            look_h[back][c] = __ldcg(stage == 2 ? &other->h[c] : &other->own[c]);
        }
        __syncthreads();
    }
    if (thread < LRU_TILE) {
        // Only the first chunk reads the state, and the last one, whose h comes from it, overwrites it.
        float before = chunk == 0 && has ? *state : 0.f;
        for (int back = min(LRU_LOOK, chunk) - 1; back >= 0; back--) {
            const bool whole = back == LRU_LOOK - 1 || back == chunk - 1;
            before = whole ? look_h[back][c] : fmaf(look_a[back][c], before, look_h[back][c]);
        }
        const float after = fmaf(all, before, own);
        if (chunks > 1) mine->h[c] = after;
        if (chunk == chunks - 1 && has) *state = after;
#pragma unroll
        for (int w = 0; w < LRU_WARPS; w++) {
            const float a_of = totals_a[w][c], h_of = totals_h[w][c];
            totals_h[w][c] = before;
            before = fmaf(a_of, before, h_of);
        }
    }
    __syncthreads();
    if (chunks > 1 && thread == 0) __threadfence(), release(&mine->stage, 2);

    h = *(float2*)&totals_h[warp][2 * lane];
#pragma unroll
    for (int j = 0; j < LRU_RUN; j++) {
        h.x = fmaf(a[j].x, h.x, b[j].x), h.y = fmaf(a[j].y, h.y, b[j].y);
        if (!used || j >= count) continue;
        float2 y = h;
        if (p.gate) {
            const float2 g = unpacked<T>(z[j]);
            y.x *= gelu(g.x), y.y *= gelu(g.y);
        }
        T* to = (T*)p.y + (row + start + j) * p.y_row + channel;
        if (PAIRED) {
            *reinterpret_cast<Bits<T>*>(to) = packed<T>(y.x, y.y);
        } else {
            to[0] = rounded<T>(y.x);
            if (second) to[1] = rounded<T>(y.y);
        }
    }
    if (chunks == 1) return;
    // The last block leaves the scratch as it was.
    __syncthreads();
    if (thread == 0) __threadfence(), last = atomicInc(&scratch->done, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    for (unsigned i = thread; i < gridDim.x; i += LRU_THREADS) scratch->chunks[i].stage = 0;
}

// Grid: channels / LRU_TILE * tokens / LRU_CHUNK * batch, both rounded up; LRU_THREADS threads.
template <class T>
__device__ void rg_lru(const RgLru& p) {
    const size_t pair = 2 * sizeof(T) - 1, pointers = (size_t)p.x | (size_t)p.r | (size_t)p.i | (size_t)p.gate | (size_t)p.y;
    const int rows = p.x_row | p.gate_row | p.y_row | (p.gate ? p.z_row : 0) | p.block | p.block_stride | p.channels;
    if ((pointers & pair) == 0 && rows % 2 == 0) rg_lru_chunk<T, true>(p);
    else rg_lru_chunk<T, false>(p);
}

}  // namespace hybrid

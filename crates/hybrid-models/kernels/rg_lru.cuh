// The real-gated linear recurrence of Griffin (De and others, arXiv 2402.19427), prefill and
// decode, in one pass over memory:
//
//     a = e^(decay sigmoid(r)),  h <- a h + sqrt(1 - a^2) sigmoid(i) x,  y = h gelu(gate)
//
// A block processes TILE channels of CHUNK tokens. Each warp has a RUN of the tokens, with a and
// the new terms of h in registers. A run maps h to A h + H.
//
// A chunk publishes its A and H, and, once it is known, the h after it. It computes the h before it
// from the h LOOK chunks back and the A and H of the chunks between, always in this order. So
// results do not depend on timing, and the chain of blocks that wait for each other is short. There
// are no separate flags: a published word is the complement of a number's bits, and 0 means that it
// has not been published. Only a NaN that no operation returns has all bits set.
#pragma once
#include "args.cuh"
#include "number.cuh"

namespace hybrid {

constexpr int LRU_THREADS = 256, LRU_WARPS = LRU_THREADS / 32, LRU_TILE = 64, LRU_RUN = 8, LRU_CHUNK = LRU_WARPS * LRU_RUN;
constexpr int LRU_BLOCKS = 4;  // Per multiprocessor.
constexpr int LRU_LOOK = 8;  // A multiple of LRU_THREADS / LRU_TILE.

// The values that a chunk publishes.
struct LruChunk {
    unsigned long long summary[LRU_TILE];  // H, and A in the lower half
    unsigned h[LRU_TILE];
    unsigned unused[64];
};
static_assert(sizeof(LruChunk) == 1024, "as args.cuh says");

struct LruScratch {
    unsigned ticket, unused[63];
    LruChunk chunks[1];
};

__device__ __forceinline__ void publish(unsigned* at, float x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(~__float_as_uint(x)) : "memory");
}
__device__ __forceinline__ void publish(unsigned long long* at, float low, float high) {
    const unsigned long long both = (unsigned long long)~__float_as_uint(high) << 32 | ~__float_as_uint(low);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(both) : "memory");
}
// Waits until a value has been published, and returns it.
__device__ __forceinline__ float published(const unsigned* at) {
    unsigned x;
    do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    while (!x);
    return __uint_as_float(~x);
}
__device__ __forceinline__ float2 published(const unsigned long long* at) {
    unsigned long long x;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    while (!x);
    return make_float2(__uint_as_float(~(unsigned)x), __uint_as_float(~(unsigned)(x >> 32)));
}

// Returns a and the new term of h of one token and channel.
__device__ __forceinline__ float2 lru_step(float x, float r, float i, float decay) {
    const float a = exp2_of(decay * sigmoid(r));
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fmaf(-a, a, 1.f)));
    return make_float2(a, x * sigmoid(i) * root);
}

struct LruShared {
    // A and H of each run; later h: the h before each run
    float a[LRU_WARPS][LRU_TILE], h[LRU_WARPS][LRU_TILE];
    float look_a[LRU_LOOK][LRU_TILE], look_h[LRU_LOOK][LRU_TILE];
    int ticket;
};

template <class T, bool PAIRED>
__device__ void rg_lru_chunk(const RgLru& p, LruShared& shared) {
    const int tiles = (p.channels + LRU_TILE - 1) / LRU_TILE, chunks = (p.tokens + LRU_CHUNK - 1) / LRU_CHUNK;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    LruScratch* scratch = (LruScratch*)p.scratch;

    // Blocks take chunks in the order in which they start, so that the chunks that a block waits
    // for are already running.
    if (thread == 0) shared.ticket = chunks > 1 ? atomicAdd(&scratch->ticket, 1) : blockIdx.x;
    __syncthreads();
    const int strands = tiles * p.batch, chunk = shared.ticket / strands, strand = shared.ticket % strands, entry = strand / tiles, first = strand % tiles * LRU_TILE;
    const bool used = first + 2 * lane < p.channels, second = first + 2 * lane + 1 < p.channels;
    const int channel = min(first + 2 * lane, p.channels - (PAIRED ? 2 : 1)), next = second ? channel + 1 : channel;
    // count: tokens from the run's start on
    const int start = chunk * LRU_CHUNK + warp * LRU_RUN, count = p.tokens - start;
    const long long row = (long long)entry * p.tokens + min(start, p.tokens - 1);

    float2 a[LRU_RUN], b[LRU_RUN];
    Bits<T> z[LRU_RUN];
    {
        Bits<T> x[LRU_RUN], r[LRU_RUN], i[LRU_RUN];
        auto gate_at = [&](int c) { return (c / p.block) * (long long)p.block_stride + c % p.block; };
        const int gate_next = PAIRED ? 1 : (int)(gate_at(next) - gate_at(channel)), x_next = PAIRED ? 1 : next - channel;
        // Reads the last token again in place of tokens beyond it.
        auto load = [&](const void* from, int stride, long long at, int to_next, Bits<T>(&to)[LRU_RUN]) {
            const T* of_row = (const T*)from + row * stride + at;
#pragma unroll
            for (int j = 0; j < LRU_RUN; j++) {
                to[j] = pair_of<PAIRED>(of_row, of_row + to_next);
                if (j + 1 < count) of_row += stride;
            }
        };
        load(p.r, p.gate_row, gate_at(channel), gate_next, r);
        load(p.i, p.gate_row, gate_at(channel), gate_next, i);
        load(p.x, p.x_row, channel, x_next, x);
        if (p.gate) load(p.gate, p.z_row, channel, x_next, z);
        const float2 r_bias = {p.r_bias[channel], p.r_bias[next]}, i_bias = {p.i_bias[channel], p.i_bias[next]};
        const float2 decay = {p.decay[channel] * LOG2_E, p.decay[next] * LOG2_E};
#pragma unroll
        for (int j = 0; j < LRU_RUN; j++) {
            const float2 xs = unpacked<T>(x[j]), rs = unpacked<T>(r[j]), in = unpacked<T>(i[j]);
            const float2 u = lru_step(xs.x, rs.x + r_bias.x, in.x + i_bias.x, decay.x), v = lru_step(xs.y, rs.y + r_bias.y, in.y + i_bias.y, decay.y);
            a[j] = make_float2(u.x, v.x), b[j] = make_float2(u.y, v.y);
            // The first token of a sequence has no factor sqrt(1 - a^2).
            if (j == 0 && start == 0 && p.first) b[j] = make_float2(xs.x * sigmoid(in.x + i_bias.x), xs.y * sigmoid(in.y + i_bias.y));
        }
    }
    // Tokens beyond the last leave h unchanged.
    if (count < LRU_RUN) {
#pragma unroll
        for (int j = 0; j < LRU_RUN; j++) {
            if (j >= count) a[j] = make_float2(1.f, 1.f), b[j] = make_float2(0.f, 0.f);
        }
    }
    float2 total = {1.f, 1.f}, h = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < LRU_RUN; j++) {
        total.x *= a[j].x, total.y *= a[j].y;
        h.x = fmaf(a[j].x, h.x, b[j].x), h.y = fmaf(a[j].y, h.y, b[j].y);
    }
    *(float2*)&shared.a[warp][2 * lane] = total, *(float2*)&shared.h[warp][2 * lane] = h;
    __syncthreads();

    // Computes h before the chunk, then before each of its runs.
    const int c = thread % LRU_TILE;
    LruChunk* mine = chunks > 1 ? &scratch->chunks[(long long)strand * chunks + chunk] : nullptr;
    float sum = 0, product = 1;  // H and A of the chunk
    if (thread < LRU_TILE) {
#pragma unroll
        for (int w = 0; w < LRU_WARPS; w++) {
            sum = fmaf(shared.a[w][c], sum, shared.h[w][c]), product *= shared.a[w][c];
        }
        if (chunk + 1 < chunks) publish(&mine->summary[c], product, sum);
    }
    if (chunk > 0) {
#pragma unroll
        for (int i = 0; i < LRU_LOOK * LRU_TILE / LRU_THREADS; i++) {
            const int back = i * (LRU_THREADS / LRU_TILE) + thread / LRU_TILE;
            if (back >= chunk) break;
            const LruChunk* other = mine - 1 - back;
            if (back == LRU_LOOK - 1 || back == chunk - 1) {
                shared.look_h[back][c] = published(&other->h[c]);
            } else {
                const float2 step = published(&other->summary[c]);
                shared.look_a[back][c] = step.x, shared.look_h[back][c] = step.y;
            }
        }
        __syncthreads();
    }
    if (thread < LRU_TILE) {
        // The first chunk reads the state. The last chunk overwrites it; its h depends on the first
        // chunk, so the state has been read by then.
        float* state = p.state + (long long)entry * p.channels + first + c;
        const bool has = first + c < p.channels;
        const int oldest = min(LRU_LOOK, chunk) - 1;
        float before = chunk > 0 ? shared.look_h[oldest][c] : has ? *state : 0.f;
        for (int back = oldest - 1; back >= 0; back--) before = fmaf(shared.look_a[back][c], before, shared.look_h[back][c]);
        const float after = fmaf(product, before, sum);
        if (chunk + 1 < chunks) publish(&mine->h[c], after);
        else if (has) *state = after;
#pragma unroll
        for (int w = 0; w < LRU_WARPS; w++) {
            const float h_of = shared.h[w][c];
            shared.h[w][c] = before;
            before = fmaf(shared.a[w][c], before, h_of);
        }
    }
    __syncthreads();

    h = *(float2*)&shared.h[warp][2 * lane];
    T* to = (T*)p.y + row * p.y_row + channel;
#pragma unroll
    for (int j = 0; j < LRU_RUN; j++, to += p.y_row) {
        h.x = fmaf(a[j].x, h.x, b[j].x), h.y = fmaf(a[j].y, h.y, b[j].y);
        float2 y = h;
        if (p.gate) {
            const float2 g = unpacked<T>(z[j]);
            y.x *= gelu(g.x), y.y *= gelu(g.y);
        }
        if (!used || j >= count) continue;
        if (PAIRED) {
            *reinterpret_cast<Bits<T>*>(to) = packed<T>(y.x, y.y);
        } else {
            to[0] = rounded<T>(y.x);
            if (second) to[1] = rounded<T>(y.y);
        }
    }
}

// Grid: channels / LRU_TILE * tokens / LRU_CHUNK * batch, both rounded up; LRU_THREADS threads.
template <class T>
__device__ void rg_lru(const RgLru& p) {
    __shared__ LruShared shared;
    const size_t pair = 2 * sizeof(T) - 1, pointers = (size_t)p.x | (size_t)p.r | (size_t)p.i | (size_t)p.gate | (size_t)p.y;
    const int rows = p.x_row | p.gate_row | p.y_row | (p.gate ? p.z_row : 0) | p.block | p.block_stride | p.channels;
    if ((pointers & pair) == 0 && rows % 2 == 0) rg_lru_chunk<T, true>(p, shared);
    else rg_lru_chunk<T, false>(p, shared);
}

}  // namespace hybrid

// The memory that the warps of wkv.cuh share: the head's constants and each producer's memory; and
// the producers' loads.
#pragma once
#include "../args.cuh"
#include "../mma.cuh"

namespace hybrid {

constexpr int HEAD = 64, WKV_CHUNK = 16, WKV_THREADS = 256;

// The roles of a block's warps: consumers first, then producers. Consumers take the chunks of two
// adjacent producers at a time.
struct WkvRoles {
    // producer: this warp's index, negative for consumers
    const int consumers, producers, producer;
    __device__ WkvRoles() : consumers(HEAD / 16 >> gridDim.x / 2), producers(blockDim.x / 32 - consumers), producer((int)threadIdx.x / 32 - consumers) {}

    // The chunks of producers 2 i and 2 i + 1 are ready.
    __device__ void arrive_full(int i) const { asm volatile("bar.arrive %0, %1;" ::"r"(1 + i), "r"(32 * (2 + consumers)) : "memory"); }
    __device__ void wait_full(int i) const { asm volatile("bar.sync %0, %1;" ::"r"(1 + i), "r"(32 * (2 + consumers)) : "memory"); }
    // The chunk of producer m has been used.
    __device__ void arrive_empty(int m) const { asm volatile("bar.arrive %0, %1;" ::"r"(8 + m), "r"(32 * (1 + consumers)) : "memory"); }
    __device__ void wait_empty(int m) const { asm volatile("bar.sync %0, %1;" ::"r"(8 + m), "r"(32 * (1 + consumers)) : "memory"); }
};

// Returns the number of chunks, rounded up to an even number, because consumers take two at a time.
// Tokens beyond the last change nothing.
__device__ __forceinline__ int wkv_chunks(int tokens) { return (tokens + 2 * WKV_CHUNK - 1) / (2 * WKV_CHUNK) * 2; }

template <class T>
using WkvRows = T[WKV_CHUNK][HEAD + PAD];

// A head's constants.
template <class T, bool TOKEN_DECAYS>
struct WkvConstants {
    T powers[TOKEN_DECAYS ? 1 : WKV_CHUNK][HEAD + PAD];  // Powers of constant decays
    // With token decays: w = 2^-2^(x log2 e + decay)
    float decay[HEAD];
    T u[HEAD];

    __device__ void fill(const Wkv& p) {
        if (threadIdx.x >= HEAD) return;
        const int key = blockIdx.y * HEAD + threadIdx.x;
        const float w = p.decay[key];
        decay[threadIdx.x] = TOKEN_DECAYS ? fmaf(w, LOG2_E, 0.52876637294f) : w;  // log2 log2 e
        u[threadIdx.x] = rounded<T>(p.u[key]);
        if (TOKEN_DECAYS) return;
        float power = 1;
        for (int t = 0; t < WKV_CHUNK; t++, power *= w) powers[t][threadIdx.x] = rounded<T>(power);
    }
};

// A producer's memory: the inputs of its chunks, and the last chunk that it prepared.
template <class T, bool TOKEN_DECAYS>
struct WkvStage {
    WkvRows<T> input_r[2], input_k[2], v[3];
    T w[2][TOKEN_DECAYS ? WKV_CHUNK : 1][HEAD];
    T pairs[TOKEN_DECAYS ? WKV_CHUNK : 1][HEAD + PAD];  // Wkv6Producer's level 2
    // Read by consumers, like v:
    WkvRows<T> r, k;  // r(t) o W(t - 1), k(s) o W(end) / W(s)
    T a[WKV_CHUNK][WKV_CHUNK + PAD];  // Above the diagonal always 0
    float decay[HEAD];  // W(end)
};

// Multiplies two pairs of elements and rounds the products to T.
template <class T>
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t times<__half>(uint32_t a, uint32_t b) {
    const __half2 c = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&c);
}
template <>
__device__ __forceinline__ uint32_t times<__nv_bfloat16>(uint32_t a, uint32_t b) {
    const __nv_bfloat162 c = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&c);
}

__device__ __forceinline__ void load16(uint32_t (&x)[4], const void* at) {
    const uint4 y = *reinterpret_cast<const uint4*>(at);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}
__device__ __forceinline__ void store16(void* at, const uint32_t (&x)[4]) { *reinterpret_cast<uint4*>(at) = make_uint4(x[0], x[1], x[2], x[3]); }
__device__ __forceinline__ void store4(void* at, uint32_t x) { *reinterpret_cast<uint32_t*>(at) = x; }

// Loads every `producers`-th chunk, two of them ahead. A lane has eight adjacent keys of every
// fourth token.
template <class T, bool TOKEN_DECAYS>
struct WkvLoader {
    const Wkv& p;
    WkvStage<T, TOKEN_DECAYS>& stage;
    const WkvRoles roles;
    const int producer, lane, quarter, keys, chunks;
    int next, half = 0, third = 0;       // The next chunk to load, and its slots
    const T *r_at, *k_at, *w_at, *v_at;  // This lane's first token of chunk `next`
    int v_token, v_column;

    __device__ WkvLoader(const Wkv& p, WkvStage<T, TOKEN_DECAYS>& stage)
        : p(p), stage(stage), producer(roles.producer), lane(threadIdx.x % 32), quarter(lane / 8), keys(lane % 8 * 8), chunks(wkv_chunks(p.tokens)), next(producer) {
        const int head = blockIdx.y * HEAD, pieces = 2 * roles.consumers;
        const long long start = (long long)blockIdx.z * p.tokens + next * WKV_CHUNK, row = start + quarter;
        r_at = (const T*)p.r + row * p.r_row + head + keys, k_at = (const T*)p.k + row * p.k_row + head + keys;
        w_at = (const T*)p.w + row * p.w_row + head + keys;
        v_token = lane / pieces, v_column = (lane % pieces + blockIdx.x * pieces) * 8;
        v_at = (const T*)p.v + (start + v_token) * p.v_row + head + v_column;
    }

    // Loads the next chunk. Tokens beyond the last become zeros.
    __device__ void load() {
        if (next < chunks) {
            const int left = p.tokens - next * WKV_CHUNK;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = quarter + 4 * i;
                copy16(&stage.input_r[half][t][keys], r_at + 4ll * i * p.r_row, t < left);
                copy16(&stage.input_k[half][t][keys], k_at + 4ll * i * p.k_row, t < left);
                if (TOKEN_DECAYS) copy16(&stage.w[half][t][keys], w_at + 4ll * i * p.w_row, t < left);
            }
            const int step = 4 * gridDim.x;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = v_token + i * step;
                if (t < WKV_CHUNK) copy16(&stage.v[third][t][v_column], v_at + (long long)i * step * p.v_row, t < left);
            }
        }
        end_copies();
        const long long rows = roles.producers * WKV_CHUNK;
        r_at += rows * p.r_row, k_at += rows * p.k_row, w_at += rows * p.w_row, v_at += rows * p.v_row;
        next += roles.producers;
        half ^= 1, third = third == 2 ? 0 : third + 1;
    }
};

}  // namespace hybrid

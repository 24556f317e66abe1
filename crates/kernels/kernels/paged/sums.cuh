// Attention probability of each entry, summed over the queries of a head, for eviction policies.
//
// The kernel reads the keys, and the log-sum-exp that attention returned. A thread block keeps PAGE
// keys in shared memory and processes the queries that see any of them in tiles. So no array of
// queries x entries exists, and the order of each sum is fixed.
#pragma once
#include "args.cuh"
#include "../mma.cuh"

constexpr int SUMS_THREADS = 128;
constexpr int QUERIES = 64;  // per tile: 16 for each warp

// Grid: (blocks of the longest kv head; kv heads of all sequences; query heads of a kv head, or 1
// if no sequence has more than one query). With one query, the rows of a tile are the query heads
// of the kv head.
template <class Pair, int D>
__device__ __forceinline__ void sums(const SumsArgs& a) {
    constexpr int PITCH = D + 8, PIECES = D / 8;
    extern __shared__ __align__(16) __half shared[];
    __half *keys = shared, *queries = shared + PAGE * PITCH;
    __shared__ float totals[4][PAGE];
    const SumsWork work = a.work[blockIdx.y];
    const bool by_head = work.queries > 1;
    const int key = blockIdx.x * PAGE, count = min(PAGE, work.len - key);
    if (count <= 0 || (!by_head && blockIdx.z > 0)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int head = work.kv_head * a.heads_per_kv + (by_head ? blockIdx.z : 0);
    const int rows = by_head ? work.queries : a.heads_per_kv;

    const __half* source = work.table ? reinterpret_cast<const __half*>(work.table[blockIdx.x])
                                      : static_cast<const __half*>(work.keys) + key * work.stride;
    const long long stride = work.table ? D : work.stride;
    for (int i = threadIdx.x; i < PAGE * PIECES; i += SUMS_THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < count) x = *reinterpret_cast<const uint4*>(source + row * stride + piece * 8);
        *reinterpret_cast<uint4*>(keys + row * PITCH + piece * 8) = x;
    }

    const int past = work.len - work.queries;  // if causal: number of entries before the queries' own
    // Returns the row of `q` for row r.
    auto row_of = [&](int r) { return by_head ? (long long)(work.first_token + r) * a.heads + head : (long long)work.first_token * a.heads + head + r; };
    const int first = a.causal && by_head ? max(0, key - past) / QUERIES * QUERIES : 0;
    float total[8][2] = {};
    for (int tile = first; tile < rows; tile += QUERIES) {
        if (a.causal && a.window && by_head && past + tile + 1 - a.window >= key + count) break;
        __syncthreads();  // All threads have read the previous queries.
        for (int i = threadIdx.x; i < QUERIES * PIECES; i += SUMS_THREADS) {
            const int row = i / PIECES, piece = i % PIECES;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (tile + row < rows) x = *reinterpret_cast<const uint4*>(static_cast<const __half*>(a.q) + row_of(tile + row) * D + piece * 8);
            *reinterpret_cast<uint4*>(queries + row * PITCH + piece * 8) = x;
        }
        __syncthreads();
        float s[8][4] = {};
#pragma unroll
        for (int c = 0; c < D; c += 16) {
            uint32_t q[4];
            load_matrices(q, shared_address(queries + (warp * 16 + lane % 16) * PITCH + c + lane / 16 * 8));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint32_t k[4];
                load_matrices(k, shared_address(keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + c + lane / 8 % 2 * 8));
                multiply(s[2 * n], q, k[0], k[1], Pair());
                multiply(s[2 * n + 1], q, k[2], k[3], Pair());
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = tile + warp * 16 + h * 8 + g;
            if (r >= rows) continue;
            const float lse = a.lse[row_of(r)];  // -inf if the query sees no entry
            const int to = a.causal ? past + 1 + (by_head ? r : 0) : work.len, from = a.causal && a.window ? to - a.window : 0;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int entry = key + n * 8 + 2 * t + e;
                    float score = s[n][2 * h + e] * a.scale;
                    if (a.soft_cap > 0.f) score = a.soft_cap * tanhf(score / a.soft_cap);
                    const float p = lse > -INFINITY && entry >= from && entry < min(to, work.len) ? exp2f((score - lse) * LOG2E) : 0.f;
                    if (by_head) total[n][e] += p;
                    else if (entry < work.len) a.out[work.out + (long long)r * work.len + entry] = p;
                }
        }
        if (!by_head && tile + QUERIES >= rows) return;
    }
    if (!by_head) return;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = total[n][e];
#pragma unroll
            for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
            if (g == 0) totals[warp][n * 8 + 2 * t + e] = x;
        }
    __syncthreads();
    if (threadIdx.x < count) {
        float x = 0.f;
#pragma unroll
        for (int w = 0; w < 4; w++) x += totals[w][threadIdx.x];
        a.out[work.out + (long long)blockIdx.z * work.len + key + threadIdx.x] = x;
    }
}

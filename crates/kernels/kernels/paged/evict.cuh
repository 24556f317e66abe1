// Evicts one entry of each kv head after a decoded token: the one with the lowest score. The score
// of an entry is its attention probability, reduced over query heads, plus its previous score. The
// newest entry takes the place of the evicted one, so that no other entry moves.
#pragma once
#include "append.cuh"
#include "../rank.cuh"

constexpr int EVICT_THREADS = 512;

// Returns the attention probability that a query head gives to an entry.
__device__ __forceinline__ float probability(const EvictArgs& a, long long head, int entry) {
    const float lse = __ldg(a.lse + head);  // -inf if the query sees no entry
    return lse > -INFINITY ? exp2f(__ldg(a.scores + head * a.scores_row + entry) - lse * LOG2E) : 0.f;
}

__device__ __forceinline__ float score_of(const EvictArgs& a, const EvictRow& row, int entry) {
    const int count = row.layer ? a.heads : a.heads_per_kv;
    const long long first = (long long)row.token * a.heads + (row.layer ? 0 : row.kv_head * a.heads_per_kv);
    float score = probability(a, first, entry);
#pragma unroll 8
    for (int h = 1; h < count; h++) {
        const float other = probability(a, first + h, entry);
        score = row.maximum ? fmaxf(score, other) : score + other;
    }
    if (!row.maximum) score /= count;
    return entry < row.scored ? row.previous[entry] + score : score;
}

__device__ __forceinline__ unsigned long long lowest_of_block(unsigned long long own) {
    __shared__ unsigned long long of_warps[EVICT_THREADS / 32];
#pragma unroll
    for (int i = 16; i > 0; i /= 2) own = min(own, __shfl_xor_sync(~0u, own, i));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
    __syncthreads();
    for (int w = 0; w < EVICT_THREADS / 32; w++) own = min(own, of_warps[w]);
    return own;
}

// Copies the newest entry to the place of `dropped`.
__device__ __forceinline__ void replace(const EvictArgs& a, const EvictRow& row, int dropped) {
    const uint64_t* table = a.tables[row.table];
    auto at = [&](int entry, int piece) {
        const bool value = piece >= a.pieces;
        return piece_at(__ldg(table + entry / PAGE), value, entry, a.pieces, value ? piece - a.pieces : piece);
    };
    for (int piece = threadIdx.x; piece < 2 * a.pieces; piece += EVICT_THREADS) *at(dropped, piece) = *at(row.len - 1, piece);
}

// Grid: (rows of the layer with the most rows, layers).
__device__ __forceinline__ void evict(const EvictArgs& a) {
    if (blockIdx.x >= a.count) return;
    __shared__ int dropped;
    const EvictRow row = a.rows[blockIdx.x];
    const int newest = row.len - 1;
    unsigned long long own = ~0ull;
    int own_entry = newest;
    for (int i = threadIdx.x; i < row.len; i += EVICT_THREADS) {
        const float score = score_of(a, row, i);
        const uint32_t position = position_of(row, i);
        const unsigned long long key = key_of(row, score, position);
        if (key <= own) own = key, own_entry = i;
        if (i == newest) continue;
        row.kept_positions[i] = position;
        if (row.kept_scores) row.kept_scores[i] = score;
    }
    const unsigned long long lowest = lowest_of_block(own);
    if (threadIdx.x < row.len && own == lowest) dropped = own_entry;
    __syncthreads();
    if (dropped == newest) return;
    replace(a, row, dropped);
    if (threadIdx.x == newest % EVICT_THREADS) {
        row.kept_positions[dropped] = position_of(row, newest);
        if (row.kept_scores) row.kept_scores[dropped] = score_of(a, row, newest);
    }
}

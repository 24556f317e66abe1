// Evicts one entry of each kv head after a decoded token: the one with the lowest score. The score
// of an entry is its attention probability, reduced over query heads, plus its previous score.
//
// A cluster of thread blocks processes a kv head. Each block scores a part of the entries, and the
// blocks exchange their lowest scores. Then each block moves the later entries one place forward,
// for its own pieces of all keys and values, so no block reads what another one writes.
#pragma once
#include <cooperative_groups.h>
#include "append.cuh"
#include "../rank.cuh"

constexpr int EVICT_THREADS = 512, EVICT_BLOCKS = 4;  // thread blocks of a cluster

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

__device__ __forceinline__ unsigned long long lowest_of_block(unsigned long long own, unsigned long long* of_warps) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) own = min(own, __shfl_xor_sync(~0u, own, i));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
    __syncthreads();
    for (int w = 0; w < EVICT_THREADS / 32; w++) own = min(own, of_warps[w]);
    return own;
}

// Moves the entries after `dropped` one place forward. A thread reads several entries before it
// writes them.
__device__ __forceinline__ void move_forward(const EvictArgs& a, const EvictRow& row, int dropped, int block) {
    constexpr int UNROLL = 4;
    const int all = 2 * a.pieces, each = (all + EVICT_BLOCKS - 1) / EVICT_BLOCKS, stretch = EVICT_THREADS / each;
    const int mine = threadIdx.x / each, piece = block * each + threadIdx.x % each;
    const bool value = piece >= a.pieces;
    const int end = mine < stretch && piece < all ? row.len : 0;
    const uint64_t* table = a.tables[row.table];
    auto at = [&](int entry) { return piece_at(__ldg(table + entry / PAGE), value, entry, a.pieces, value ? piece - a.pieces : piece); };
    for (int start = dropped + 1; start < row.len; start += UNROLL * stretch) {
        uint4 x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int entry = start + u * stretch + mine;
            if (entry < end) x[u] = *at(entry);
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int entry = start + u * stretch + mine;
            if (entry < end) *at(entry - 1) = x[u];
        }
        __syncthreads();
    }
}

// Grid: (EVICT_BLOCKS for each row of the layer with the most rows, layers).
__device__ __forceinline__ void evict(const EvictArgs& a) {
    if (blockIdx.x / EVICT_BLOCKS >= a.count) return;
    __shared__ unsigned long long of_warps[EVICT_THREADS / 32], of_blocks[EVICT_BLOCKS];
    const auto cluster = cooperative_groups::this_cluster();
    auto started = cluster.barrier_arrive();
    const EvictRow row = a.rows[blockIdx.x / EVICT_BLOCKS];
    const int block = cluster.block_rank(), first = block * EVICT_THREADS + threadIdx.x, step = EVICT_BLOCKS * EVICT_THREADS;
    unsigned long long own = ~0ull;
    for (int i = first; i < row.len - row.recent; i += step)
        if (i >= row.sinks) own = min(own, place_of(score_of(a, row, i), i));
    own = lowest_of_block(own, of_warps);
    cluster.barrier_wait(std::move(started));  // All blocks have started, so their memory can be written.
    if (threadIdx.x < EVICT_BLOCKS) *cluster.map_shared_rank(of_blocks + block, threadIdx.x) = own;
    cluster.sync();
#pragma unroll
    for (int i = 0; i < EVICT_BLOCKS; i++) own = min(own, of_blocks[i]);
    const int dropped = int(~uint32_t(own));
    for (int i = first; i < row.len; i += step) {
        if (i == dropped) continue;
        const int place = i - (i > dropped);
        row.kept_positions[place] = i < row.placed ? row.positions[i] : row.next + (i - row.placed);
        if (row.kept_scores) row.kept_scores[place] = score_of(a, row, i);
    }
    move_forward(a, row, dropped, block);
}

// The attention probability that each token receives, summed over the queries of a head, for
// eviction policies.
//
// A second pass over the keys only, with the log-sum-exp of attention. A warp keeps one packed tile
// of 32 tokens in shared memory and processes all queries. So no array of queries x tokens exists,
// and the order of each sum is fixed.
#pragma once
#include "scores.cuh"

namespace kvq {

constexpr int SUM_WARPS = 4;

// Adds the columns' probabilities of 32 tokens, given their scores.
__device__ __forceinline__ void add_probabilities(float (&sum)[2][2][2], const float (&s)[2][1][4], const Columns<1>& columns, const AttendArgs& args,
                                                  const Work& work, int first, int valid, int lane) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int column = lane % 4 * 2 + e;
        float all = column < valid ? args.lse[row_of(args, work, first + column)] * LOG2E : -INFINITY;
        if (all == -INFINITY) continue;  // An unused column, or a query that sees no entry.
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) sum[r][h][e] += exp2_fast(fmaf(s[r][0][2 * h + e], columns.scale[0][e], -all));
    }
}

// Grid: (tiles of the longest kv head / SUM_WARPS, rounded up, separately for packed entries and
// residual; kv heads of all sequences, one item of `work` each; query heads of a kv head, or blocks
// of 8 of them if no sequence has more than one query). `lse` is an input. `out` receives f32
// [heads_per_kv, slots] per kv head, with 0 for holes.
template <class L>
__device__ __forceinline__ void sums(const AttendArgs& args) {
    constexpr int D = L::D, SOURCE = L::HEADER + L::V_CODES;
    __shared__ __align__(128) unsigned char queries[2][16 * D];  // for the residual and for packed keys
    extern __shared__ __align__(128) unsigned char sources[];
    __shared__ float factors[2][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const HeadWork work(args, blockIdx.y);
    const int packed = work.packed, slots = packed + work.residual, packed_tiles = (packed + TILE - 1) / TILE;
    const int tile = blockIdx.x * SUM_WARPS + warp;
    const bool coded = tile < packed_tiles;
    const int ring_at = (tile - packed_tiles) * TILE, at = coded ? tile * TILE : packed + ring_at, end = coded ? packed : slots;
    const bool by_head = work.queries > 1;
    const int first_head = by_head ? blockIdx.z : 8 * blockIdx.z;
    if (first_head >= args.heads_per_kv || blockIdx.x * SUM_WARPS * TILE >= slots + 2 * TILE) return;

    unsigned char* source = sources + warp * SOURCE;
    if (coded) {
        const unsigned char* record = reinterpret_cast<const unsigned char*>(work.table[tile / L::TILES]);
        const unsigned char* keys = record + L::HEADER + tile % L::TILES * L::TILE_BYTES;
        for (int i = lane * 16; i < L::HEADER; i += 512) copy16(shared_address(source + i), record + i);
        for (int i = lane * 16; i < L::V_CODES; i += 512) copy16(shared_address(source + L::HEADER + i), keys + i);
    }
    copy_commit();

    float sum[2][2][2] = {};  // [r][h][e]: token 16 r + 8 h + lane / 4, column 2 (lane % 4) + e
    const int last_column = by_head ? (first_head + 1) * work.queries : min(args.heads_per_kv, first_head + 8);
    for (int first = first_head * work.queries; first < last_column; first += 8) {
        const int valid = min(8, last_column - first);
        __syncthreads();  // The previous queries are no longer read.
        load_queries<D, 1>(args, work, first, valid, false, queries[0], factors[0]);
        load_queries<D, 1>(args, work, first, valid, args.rotated & ROTATED_KEYS, queries[1], factors[1]);
        copy_wait<0>();
        __syncthreads();
        if (at >= end) continue;
        Columns<1> columns = columns_of<1>(args, factors[coded], work.queries, first, entries_of(work), lane);
        float s[2][1][4] = {};
        if (coded) {
            uint32_t scaled[D / 16][1][2];
            float bias[1][4];
            scale_queries<L, 1>(scaled, bias, source, queries[1], lane);
            packed_scores<L, 1>(s, scaled, bias, source + L::HEADER, args.key_scale, lane);
        } else {
            residual_scores<D, 1>(s, work.ring_k, args.kind, queries[0], lane, [&](int token) {  // Tokens past the end are masked; any finite token can be read.
                int i = work.ring_start + min(ring_at + token, work.residual - 1);
                return (i >= args.ring ? i - args.ring : i) * (long long)D;
            });
        }
        restrict<1>(s, columns, work, at, end, lane);
        add_probabilities(sum, s, columns, args, work, first, valid, lane);
    }

    float* out = static_cast<float*>(args.out) + work.sums + (long long)first_head * slots;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int token = at + 16 * r + 8 * h + lane / 4;
            if (by_head) {
                float x = sum[r][h][0] + sum[r][h][1];
                x += __shfl_xor_sync(FULL, x, 1);
                x += __shfl_xor_sync(FULL, x, 2);
                if (lane % 4 == 0 && token < end) out[token] = x;
            } else {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int column = lane % 4 * 2 + e;
                    if (first_head + column < args.heads_per_kv && token < end) out[(long long)column * slots + token] = sum[r][h][e];
                }
            }
        }
}

// Bytes of dynamic shared memory.
template <class L>
constexpr int sums_shared() {
    return SUM_WARPS * (L::HEADER + L::V_CODES);
}

}  // namespace kvq

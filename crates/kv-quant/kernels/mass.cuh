// Attention probability that each token receives, summed over the queries of a head: what eviction policies ask for.
//
// A second pass over the keys alone, with the log-sum-exp that attention left. A warp keeps one tile of 32 tokens, packed as it is, in shared
// memory while all queries pass: nothing of size queries x tokens exists, and sums have one order.
#pragma once
#include "scores.cuh"

namespace kvq {

constexpr int MASS_WARPS = 4;

// Adds the columns' probabilities of 32 tokens, given their scores.
__device__ __forceinline__ void add_probabilities(float (&sum)[2][2][2], const float (&s)[2][1][4], const Columns<1>& columns, const float* lse,
                                                  int live, int lane) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int column = lane % 4 * 2 + e;
        float all = column < live ? lse[column] * LOG2E : -INFINITY;
        if (all == -INFINITY) continue;  // No column, or one that sees nothing.
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) sum[r][h][e] += exp2_fast(fmaf(s[r][0][2 * h + e], columns.scale[0][e], -all));
    }
}

// Grid: (tiles / MASS_WARPS rounded up, those of packed tokens and of the residual counted each on their own; batch * kv_heads; heads of a kv
// head, or with one query blocks of 8 of them). `lse` is read, and `out` is f32 [batch, heads, tokens].
template <int BITS, int GROUP, int D>
__device__ __forceinline__ void mass(const AttendArgs& args) {
    using L = Layout<BITS, GROUP, D>;
    constexpr int SOURCE = L::HEADER + L::CODES;
    __shared__ __align__(128) unsigned char queries[16 * D];
    extern __shared__ __align__(128) unsigned char sources[];
    __shared__ float factors[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long row = blockIdx.y;
    const int packed = args.packed_len, tokens = packed + args.residual_len, packed_tiles = (packed + TILE - 1) / TILE;
    const int tile = blockIdx.x * MASS_WARPS + warp;
    const bool coded = tile < packed_tiles;
    const int ring_at = (tile - packed_tiles) * TILE, at = coded ? tile * TILE : packed + ring_at, end = coded ? packed : tokens;
    const bool by_head = args.queries > 1;

    unsigned char* source = sources + warp * SOURCE;
    if (coded) {
        const unsigned char* record = args.packed + row * args.packed_stride + (long long)(tile / L::TILES) * L::RECORD;
        const unsigned char* codes = record + L::HEADER + tile % L::TILES * L::TILE_BYTES + L::K_CODES;
        for (int i = lane * 16; i < L::HEADER; i += 512) copy16(shared_address(source + i), record + i);
        for (int i = lane * 16; i < L::CODES; i += 512) copy16(shared_address(source + L::HEADER + i), codes + i);
    }
    copy_commit();

    float sum[2][2][2] = {};  // of tokens 16 r + 8 h + lane / 4, columns 2 (lane % 4) + e
    const int all = by_head ? args.queries : args.heads_per_kv;
    const int first_head = by_head ? blockIdx.z : 8 * blockIdx.z;
    const long long first_row = (row * args.heads_per_kv + first_head) * args.queries;
    for (int first = 0; first < (by_head ? args.queries : 1); first += 8) {
        const int live = min(8, by_head ? all - first : all - first_head);
        __syncthreads();  // All are done with the queries before.
        load_queries<D, 1>(args, first_row + first, live, queries, factors);
        copy_wait<0>();
        __syncthreads();
        if (at >= end) continue;
        Columns<1> columns = columns_of<1>(args, factors, first, tokens, lane);
        float s[2][1][4] = {};
        if (coded) {
            uint32_t scaled[D / 16][1][2];
            float bias[1][4];
            packed_scores<L, 1>(s, scaled, bias, source, source + L::HEADER - L::K_CODES, queries, true, lane);
        } else {
            residual_scores<D, 1>(s, args, queries, lane, [&](int token) {  // A token past the end is masked: any finite one will do.
                int i = args.ring_start + min(ring_at + token, args.residual_len - 1);
                return (row * args.ring + (i >= args.ring ? i - args.ring : i)) * D;
            });
        }
        restrict<1>(s, columns, at, end, lane);
        add_probabilities(sum, s, columns, args.lse + first_row + first, live, lane);
    }

    float* out = static_cast<float*>(args.out);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int token = at + 16 * r + 8 * h + lane / 4;
            if (by_head) {
                float x = sum[r][h][0] + sum[r][h][1];
                x += __shfl_xor_sync(FULL, x, 1);
                x += __shfl_xor_sync(FULL, x, 2);
                if (lane % 4 == 0 && token < end) out[first_row / args.queries * tokens + token] = x;
            } else {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int column = lane % 4 * 2 + e;
                    if (first_head + column < all && token < end) out[(first_row + column) * tokens + token] = sum[r][h][e];
                }
            }
        }
}

// Bytes of dynamic shared memory.
template <int BITS, int GROUP, int D>
constexpr int mass_shared() {
    using L = Layout<BITS, GROUP, D>;
    return MASS_WARPS * (L::HEADER + L::CODES);
}

}  // namespace kvq

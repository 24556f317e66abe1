// The data that the warps of wkv7_chunks.cuh share: the results of a chunk that producers pass to
// consumers, the chunk's inputs, and the head's constants.
//
// Producers hold tokens x keys as fragments. A lane has tokens row and row + 8 (row = lane / 4),
// and keys that are contiguous in memory: columns pair and pair + 1 of tile j (eight keys) are the
// keys k and k + 1. In the first half of the head (j < 4), k = 8 (lane % 4) + 2 j; in the second
// half, 24 more. The order is the same in every product that sums over keys.
#pragma once
#include <type_traits>
#include "../args.cuh"
#include "../mma.cuh"

namespace hybrid {

constexpr int WKV7_CHUNK = 16, WKV7_DIM = 64, WKV7_TILES = WKV7_DIM / 8;
constexpr int WKV7_WARPS = 12, WKV7_THREADS = 32 * WKV7_WARPS;
// Keys, state and everything computed from them are divided by this factor, so that states up to a
// million fit f16.
constexpr float WKV7_SCALE = 16.f;

template <class T, int VALUES>
struct Wkv7Chunk {
    // Each lane's fragments B of R' and C', 16 keys each
    uint4 r[WKV7_TILES / 2][32], c[WKV7_TILES / 2][32];
    // 8 x 8 blocks: [tile, half of the tokens][token][keys]
    uint32_t k[2 * WKV7_TILES][32], b[2 * WKV7_TILES][32];
    // K R', B R', K C' and -(I + B C')^-1: blocks [half of t, half of s][s][t]
    uint32_t kr[4][32], br[4][32], kc[4][32], solve[4][32];
    // Blocks of T of 16 values: [half of the tokens, half of the values][token][values]
    uint4 v[VALUES / 16][32];
    // M and W(15) / M of [lane % 4][tile]
    float2 before[4][WKV7_TILES + 2], after[4][WKV7_TILES + 2];
};

// A chunk's inputs as loaded, in pieces of 16 bytes. The order of the pieces of a row depends on
// the row (at ^ turn), to avoid bank conflicts.
struct Wkv7Raw {
    uint4 key[WKV7_CHUNK][8], a[WKV7_CHUNK][8], r[WKV7_CHUNK][8], w[WKV7_CHUNK][8];
};
__device__ __forceinline__ int turn_of_rows(int t) { return t % 2 * 4; }
__device__ __forceinline__ int turn_of_pairs(int t) { return t / 2 % 4; }
__device__ __forceinline__ int turn_of_values(int eight) { return eight * 2 % 8 + eight / 4; }

// Constants of all chunks, two f16 in a word, indexed [lane % 4][half of the tiles].
struct Wkv7Weights {
    uint4 rate_bias[4][2], key_rate[4][2], removal[4][2], bonus[4][2];

    // Called by one warp.
    __device__ void fill(const Wkv7& p, int lane) {
        const int j = lane / 4, key = blockIdx.y * WKV7_DIM + j / 4 * 32 + lane % 4 * 8 + j % 4 * 2;
        auto of = [&](const float* x) { return *(const float2*)(x + key); };
        auto put = [&](uint4(&to)[4][2], float x, float y) { ((uint32_t*)&to[lane % 4][0])[j] = packed<__half>(x, y); };
        const float2 bias = of(p.rate_bias), rate = of(p.key_rate), scale = of(p.removal_scale), share = of(p.bonus_weight);
        // The rate is computed as (1 + tanh(x / 2)) / 2.
        put(rate_bias, 0.5f * bias.x, 0.5f * bias.y), put(key_rate, 0.5f / WKV7_SCALE * rate.x, 0.5f / WKV7_SCALE * rate.y);
        put(removal, scale.x, scale.y), put(bonus, share.x, share.y);
    }
};

template <class T, int VALUES>
struct Wkv7Shared {
    // The other warps of the block return at once.
    static constexpr int CONSUMERS = VALUES / 16, PRODUCERS = VALUES == WKV7_DIM ? 8 : 6;
    Wkv7Chunk<T, VALUES> chunks[PRODUCERS];
    Wkv7Raw raw[PRODUCERS];
    Wkv7Weights weights;
    uint64_t full[PRODUCERS], empty[PRODUCERS];
};

// Converts two elements of T in a word to two f16.
template <class T>
__device__ __forceinline__ uint32_t as_f16(uint32_t x) {
    if (std::is_same<T, __half>::value) return x;
    const float2 y = unpacked<T>(x);
    return packed<__half>(y.x, y.y);
}
constexpr uint32_t ONES = 0x3c003c00, HALVES = 0x38003800;  // As two f16
__device__ __forceinline__ void four(const uint4& x, uint32_t (&to)[4]) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }

}  // namespace hybrid

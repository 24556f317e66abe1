// A tile: the queries of one thread block, and the keys that they see.
//
// A tile holds `pack` query heads of one kv head times ROWS / pack consecutive tokens of one
// sequence. Row r is token r / pack and head r % pack. Packed heads share the loads of keys and
// values.
#pragma once
#include "args.cuh"

struct Tile {
    int first_token, tokens;     // first_token: index in the call
    int first_head, kv_head;
    int seq, first_key, keys;    // first_key: index in the call, if keys are contiguous
    int position;                // Position of the first token among the keys
    int causal, window;

    // A token of the tile sees the keys start..limit.
    __device__ int limit(int token) const { return causal ? min(max(position + token + 1, 0), keys) : keys; }
    __device__ int start(int token) const { return window ? max(position + token + 1 - window, 0) : 0; }
};

// The blocks of N keys that a tile visits, from the last to the first. Blocks outside
// clear_begin..clear_end need a mask.
struct KeyBlocks {
    int begin, end, clear_begin, clear_end;
};

template <int N>
__device__ KeyBlocks key_blocks(const Tile& tile) {
    const int last = tile.tokens - 1;
    KeyBlocks blocks;
    blocks.begin = tile.start(0) / N, blocks.end = (tile.limit(last) + N - 1) / N;
    blocks.clear_begin = (tile.start(last) + N - 1) / N, blocks.clear_end = tile.limit(0) / N;
    return blocks;
}

// The heads of a sequence are processed in sections whose keys and values fit the L2 cache. A
// section has at least SECTION_TILES tiles, about two waves.
constexpr int64_t L2_BYTES = 24 << 20;
constexpr int SECTION_TILES = 256;

// Finds the tile of a thread block. Returns false if there are fewer tiles than thread blocks. All
// lanes of a warp call it. Within a sequence, tiles with the most keys come first, so that the last
// ones to run are short.
template <int ROWS, int D>
__device__ bool find_tile(const PrefillArgs& a, int index, Tile& tile) {
    const uint32_t* cu_q = reinterpret_cast<const uint32_t*>(a.cu_seqlens_q);
    const int lane = threadIdx.x % 32, tile_tokens = ROWS / a.pack, groups = a.heads / a.pack;
    int seq = 0, tiles = 0;
    for (int base = 0;; base += 32) {
        if (base >= a.seqs) return false;
        const int s = base + lane;
        tiles = s < a.seqs ? (int(cu_q[s + 1] - cu_q[s]) + tile_tokens - 1) / tile_tokens : 0;
        int sum = tiles * groups;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        const unsigned after = __ballot_sync(~0u, sum > index);
        if (after) {
            const int owner = __ffs(after) - 1;
            seq = base + owner;
            index -= __shfl_sync(~0u, sum - tiles * groups, owner);
            tiles = __shfl_sync(~0u, tiles, owner);
            break;
        }
        index -= __shfl_sync(~0u, sum, 31);
    }

    const int first = cu_q[seq], queries = int(cu_q[seq + 1]) - first, group_heads = a.heads / a.kv_heads;
    tile.seq = seq, tile.causal = a.causal, tile.window = a.window;
    int keys = a.kv_extent;
    if (!a.block_table) {
        const uint32_t* cu_k = reinterpret_cast<const uint32_t*>(a.cu_seqlens_k);
        tile.first_key = cu_k[seq], keys = int(cu_k[seq + 1]) - tile.first_key;
    }
    const int64_t bytes = int64_t(keys) * D * 4 * a.kv_heads;
    const int sections = max(1, min(min(groups, tiles * groups / SECTION_TILES), int((bytes + L2_BYTES - 1) / L2_BYTES)));
    const int section = ((index / tiles + 1) * sections - 1) / groups;  // It starts at group section * groups / sections
    const int first_group = section * groups / sections, groups_here = (section + 1) * groups / sections - first_group;
    index -= tiles * first_group;
    const int m = tiles - 1 - index / groups_here;
    tile.first_head = (first_group + index % groups_here) * a.pack;
    tile.kv_head = tile.first_head / group_heads;
    if (a.block_table)
        tile.first_key = 0, keys = reinterpret_cast<const uint32_t*>(a.seqlens_k)[seq * a.lens_seq + tile.kv_head * a.lens_head];
    tile.keys = keys;
    tile.first_token = first + m * tile_tokens, tile.tokens = min(tile_tokens, queries - m * tile_tokens);
    tile.position = m * tile_tokens + (a.past ? keys : keys - queries);
    return true;
}

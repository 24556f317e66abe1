// Copies new entries into blocks, and entries from blocks to others.
#pragma once
#include <dependent.cuh>
#include "args.cuh"

constexpr int APPEND_THREADS = 256, MOVE_THREADS = 512;
// 16-byte pieces of an entry that a thread block moves: a sector of memory.
constexpr int MOVE_PIECES = 2;

// Returns the address of a 16-byte piece of an entry in its block.
__device__ __forceinline__ uint4* piece_at(uint64_t block, bool value, int entry, int pieces, int piece) {
    return reinterpret_cast<uint4*>(block) + (long long)((value ? PAGE : 0) + entry % PAGE) * pieces + piece;
}

// Grid: (entries * pieces / APPEND_THREADS of the longest row, rounded up; rows; 2: keys and values).
__device__ __forceinline__ void append(const AppendArgs& a) {
    wait_for_previous_kernel();
    start_next_kernel();
    const AppendRow& row = a.rows[blockIdx.y];
    const bool value = blockIdx.z;
    uint64_t* table = a.tables[row.table];
    const uint64_t* new_blocks = a.new_blocks + row.new_blocks;
    if (blockIdx.x == 0 && !value)
        for (int i = threadIdx.x; i < row.new_block_count; i += APPEND_THREADS) table[row.first_new_block + i] = new_blocks[i];
    const long long at = blockIdx.x * (long long)APPEND_THREADS + threadIdx.x;
    const int i = int(at / a.pieces), piece = int(at % a.pieces);
    if (i >= row.count) return;
    // The host has not checked the list: an index beyond the sequence's tokens must not be read.
    const long long token = row.first_token + (row.tokens ? min(row.tokens[i], uint32_t(row.seqlen - 1)) : i);
    const long long source = value ? token * a.v_token + row.kv_head * a.v_head : token * a.k_token + row.kv_head * a.k_head;
    const int entry = row.first + i, block = entry / PAGE;
    // Other thread blocks may not have written this launch's new blocks to the table yet.
    const uint64_t to = block < row.first_new_block ? table[block] : new_blocks[block - row.first_new_block];
    *piece_at(to, value, entry, a.pieces, piece) = static_cast<const uint4*>(value ? a.v : a.k)[source + piece];
}

// Returns the index of the first entry that moves. Source entries increase, so entries before it
// stay where they are. In another table, all entries move.
__device__ __forceinline__ int first_moved(const MoveRow& row) {
    int low = 0, high = row.from == row.to ? row.count : 0;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (row.entries[middle] == uint32_t(row.first + middle)) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Grid: (pieces / MOVE_PIECES rounded up, rows, 2). A thread block reads several entries before it
// writes them, so entries can move within a block.
__device__ __forceinline__ void move(const MoveArgs& a) {
    constexpr int UNROLL = 8, STRETCH = MOVE_THREADS / MOVE_PIECES;
    const MoveRow& row = a.rows[blockIdx.y];
    const int piece = blockIdx.x * MOVE_PIECES + threadIdx.x % MOVE_PIECES, mine = threadIdx.x / MOVE_PIECES;
    const bool value = blockIdx.z, live = piece < a.pieces;
    for (int start = first_moved(row); start < row.count; start += UNROLL * STRETCH) {
        uint4 x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = start + u * STRETCH + mine;
            if (!live || i >= row.count) continue;
            const uint32_t entry = min(row.entries[i], uint32_t(row.len - 1));
            x[u] = *piece_at(row.from[entry / PAGE], value, entry, a.pieces, piece);
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = start + u * STRETCH + mine, entry = row.first + i;
            if (live && i < row.count) *piece_at(row.to[entry / PAGE], value, entry, a.pieces, piece) = x[u];
        }
        __syncthreads();
    }
}

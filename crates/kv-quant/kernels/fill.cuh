// Appends entries of many sequences: copies them to the rings, and packs entries of the rings and
// of the call's tensors into records.
#pragma once
#include <cstddef>
#include <cstdint>
#include <dependent.cuh>
#include "args.cuh"

namespace kvq {

// A kv head of a sequence. Entries from number `first_new` on are in the call's tensors, earlier
// ones in the ring: entry e is at position (e + shift) % ring. Mirrored by `FillRow` in
// src/cuda/args.rs.
struct FillRow {
    unsigned long long tag;        // sequence and kv head, for the report
    int head;                      // index in `kv_heads`
    int status;                    // index in `status`
    int kv_head, first_token;      // head and token of entry first_new in the call's tensors
    int first_new, shift;
    int move_from, move_to;        // entries to copy into the ring
    int first_new_record;          // first new record
    int new_records;               // index of its address in `new_records`
    int key_record, key_records;   // records whose keys are packed: first and count
    int value_tile, value_tiles;   // tiles of 32 entries whose values are packed: first and count
    int round;                     // whether dequantized keys are also written to the ring
    int unused;
};

// Mirrored by `FillArgs` in src/cuda/args.rs.
struct FillArgs {
    const FillRow* rows;
    const KvHead* kv_heads;  // of all sequences
    const void* new_k;       // the call's tensors
    const void* new_v;
    const unsigned long long* new_records;  // addresses of new records, which the kernel writes to the tables
    unsigned long long* status;             // output, per sequence: one group that is out of range, if any; see `report`
    long long k_token, k_head, v_token, v_head;  // strides of the call's tensors, in elements
    int ring;          // capacity of a ring
    int kind;          // dtype: 0 f16, 1 bf16
    int pieces;        // 16-byte pieces of an entry
    int rotated;       // bit 0: keys are rotated before quantization, bit 1: values are
    int f16_steps;     // whether each step (minimum, range, quotient) is rounded to f16, as in KIVI
    float key_scale, value_scale;  // the scales of schemes without stored scales
    int unused;
};

static_assert(sizeof(FillRow) == 72 && offsetof(FillRow, first_new) == 24, "as in src/cuda/args.rs");
static_assert(sizeof(FillArgs) == 112 && offsetof(FillArgs, ring) == 80, "as in src/cuda/args.rs");

// A row, its kv head's memory, and its part of the call's tensors: entry e is at
// (e - first_new) * stride.
struct HeadRow : FillRow, KvHead {
    const __half* new_k;
    const __half* new_v;
    __device__ __forceinline__ HeadRow(const FillArgs& args, int i) : FillRow(args.rows[i]), KvHead(args.kv_heads[head]) {
        new_k = static_cast<const __half*>(args.new_k) + first_token * args.k_token + kv_head * args.k_head;
        new_v = static_cast<const __half*>(args.new_v) + first_token * args.v_token + kv_head * args.v_head;
    }
};

// Grid: (entries, rows, 2); `pieces` threads.
__device__ __forceinline__ void fill_rings(const FillArgs& args) {
    wait_for_previous_kernel();
    start_next_kernel();
    const HeadRow row(args, blockIdx.y);
    const int entry = row.move_from + blockIdx.x;
    if (entry >= row.move_to) return;
    const __half* from = blockIdx.z ? row.new_v + (entry - row.first_new) * args.v_token : row.new_k + (entry - row.first_new) * args.k_token;
    uint4* to = static_cast<uint4*>(blockIdx.z ? row.ring_v : row.ring_k);
    to[(entry + row.shift) % args.ring * args.pieces + threadIdx.x] = reinterpret_cast<const uint4*>(from)[threadIdx.x];
}

// The slots of a ring that are kept, and compacted. Mirrored by `CompactRow` in src/cuda/args.rs.
struct CompactRow {
    void* ring_k;  // slot s is at position (s + shift) % ring
    void* ring_v;
    const unsigned* slots;  // the slots that are kept, in order
    int count, first;       // their number, and the destination of the first
    int shift;
    int ring;    // capacity of the ring
    int pieces;  // 16-byte pieces of a slot
    int unused;
};

static_assert(sizeof(CompactRow) == 48, "as in src/cuda/args.rs");

constexpr int KEEP_THREADS = 256;

// Grid: (rows, 2); KEEP_THREADS threads. No slot moves to a later position, and a block reads
// several slots before it writes them.
__device__ __forceinline__ void keep_ring(const CompactRow* rows) {
    const CompactRow& row = rows[blockIdx.x];
    uint4* numbers = static_cast<uint4*>(blockIdx.y ? row.ring_v : row.ring_k);
    const int step = KEEP_THREADS / row.pieces, piece = threadIdx.x % row.pieces, mine = threadIdx.x / row.pieces;
    for (int start = 0; start < row.count; start += step) {
        const int i = start + mine;
        const bool moves = mine < step && i < row.count;
        uint4 x;
        if (moves) x = numbers[(row.slots[i] + row.shift) % row.ring * row.pieces + piece];
        __syncthreads();
        if (moves) numbers[(row.first + i + row.shift) % row.ring * row.pieces + piece] = x;
        __syncthreads();
    }
}

}  // namespace kvq

// New entries of many sequences: into the rings and, from there or straight from the call's
// tensors, into records.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvq {

// A kv head of a sequence. Entries have numbers: those from `first_new` on are in the call's
// tensors, those before in the ring. Mirrored by `FillRow` in src/cuda/args.rs.
struct FillRow {
    void* ring_k;           // entry e lies at place (e + shift) % ring, D channels each
    void* ring_v;
    const void* new_k;      // rows of `stride` numbers: entry first_new is the first
    const void* new_v;
    unsigned long long* table;        // the address of each record
    const unsigned long long* fresh;  // those of the records that are taken now, which the kernel puts into the table
    unsigned long long* status;       // takes a group out of range, any one if there are several; see `report`
    unsigned long long tag;           // what of the report is known on the host: sequence and kv head
    int first_new, shift;
    int move_from, move_to;        // entries to copy into the ring
    int fresh_record;              // the first record that is taken now
    int key_record, key_records;   // records that take keys: the first, how many
    int value_tile, value_tiles;   // tiles of 32 entries that take values: the first, how many
    int round;                     // whether what packed keys stand for is written to the ring, too
};

// Mirrored by `FillArgs` in src/cuda/args.rs.
struct FillArgs {
    const FillRow* rows;
    long long stride;  // numbers from a token of the call's tensors to the next
    int ring;          // places in a ring
    int kind;          // of numbers: 0 f16, 1 bf16
    int pieces;        // of 16 bytes, in an entry
    int rotated;       // 1: keys are rotated before they are quantized, 2: values are
    int f16_steps;     // whether minima, ranges and quotients of whole numbers are rounded to f16 one by one, as KIVI's are
    float key_scale, value_scale;  // of schemes without scales of their own
    int unused;
};

static_assert(sizeof(FillRow) == 104 && offsetof(FillRow, first_new) == 64, "as in src/cuda/args.rs");
static_assert(sizeof(FillArgs) == 48 && offsetof(FillArgs, ring) == 16, "as in src/cuda/args.rs");

// Grid: (entries, rows, 2); `pieces` threads.
__device__ __forceinline__ void fill_rings(const FillArgs& args) {
    const FillRow& row = args.rows[blockIdx.y];
    const int entry = row.move_from + blockIdx.x;
    if (entry >= row.move_to) return;
    const uint4* from = static_cast<const uint4*>(blockIdx.z ? row.new_v : row.new_k);
    uint4* to = static_cast<uint4*>(blockIdx.z ? row.ring_v : row.ring_k);
    to[(entry + row.shift) % args.ring * args.pieces + threadIdx.x] = from[(entry - row.first_new) * (args.stride / 8) + threadIdx.x];
}

// The slots of a ring that stay, which move together. Mirrored by `KeepRow` in src/cuda/args.rs.
struct KeepRow {
    void* ring_k;  // slot s lies at place (s + shift) % ring
    void* ring_v;
    const unsigned* slots;  // those that stay, in order
    int count, first;       // how many, and the slot that the first moves to
    int shift;
    int ring;    // places
    int pieces;  // of 16 bytes, in a slot
    int unused;
};

static_assert(sizeof(KeepRow) == 48, "as in src/cuda/args.rs");

constexpr int KEEP_THREADS = 256;

// Grid: (rows, 2); KEEP_THREADS threads. No slot moves to a later one: a block reads a stretch of
// them before it writes the same stretch.
__device__ __forceinline__ void keep_ring(const KeepRow* rows) {
    const KeepRow& row = rows[blockIdx.x];
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

// The arguments of an attention kernel, and how it reads and writes numbers of either 16-bit kind.
#pragma once
#include <cuda_bf16.h>
#include <cstddef>
#include "ptx.cuh"

namespace kvq {

// One block's share of a launch: some records of a kv head of a sequence, or its ring, for 8 N
// columns. The host makes the list of them, so that long sequences are split over more blocks than
// short ones. One without queries is none: a list may be longer than it need be. Mirrored by `Work`
// in src/cuda/args.rs.
//
// Slots are the places of a kv head's tokens: those in records, then those in the ring. A slot
// whose entry was dropped, or is not selected, is a hole. Entries are the other slots, numbered in
// order.
struct Work {
    const unsigned long long* table;  // the block table of the kv head: the address of each of its records
    const void* ring_k;               // its ring of `ring` entries, D channels each, f16 or bf16
    const void* ring_v;
    const uint2* live;  // for each 32 slots: a bit for each that is no hole, and the entries before them; null: there are no holes
    long long sums;    // the place in `out` of the kv head's first sum, in sums.cuh
    int packed;        // slots in records; the last record may hold more, which are not seen
    int residual;      // slots in the ring, newer than the packed ones
    int ring_start;    // the place of the oldest one
    int kv_head;
    int queries;       // of the sequence
    int first_token;   // the first one's token in q
    int first_column;  // column c of a kv head is query c % queries of its head c / queries
    int from, to;      // records that the block reads; a block with from < 0 reads the ring
    int first_part;    // of the parts that are joined: those of a kv head and a block of columns
    int part, parts;   // which one of how many this block computes
    int join;          // the place in `arrived` for these parts
    int live_slots;    // slots that `live` covers, a multiple of 32; there are no holes after them
    int holes;
    int unused;
};

// Mirrored by `AttendArgs` in src/cuda/args.rs.
struct AttendArgs {
    const void* q;      // [tokens, heads, D], f16 or bf16, contiguous
    void* out;          // [tokens, heads, D], as `out_kind` says
    float* lse;         // [tokens, heads], natural logarithm; may be null. sums.cuh reads it
    float* part_out;    // [parts, columns, D]
    float* part_lse;    // [parts, columns], in base 2
    unsigned* arrived;  // a zero for each join, before and after
    const Work* work;   // one for each block; in sums.cuh, one for each kv head of a sequence
    int heads, heads_per_kv;
    int ring;        // places in a ring
    int causal;      // the last `queries` entries are the queries' own
    int window;      // entries that a query sees up to its own, with `causal`; 0: all
    int kind;        // of q and the rings: 0 f16, 1 bf16
    int out_kind;    // 0 f16, 1 bf16, 2 f32
    float scale;     // of the scores
    float soft_cap;  // 0: none
    int rotated;     // 1: packed keys are rotated, 2: packed values are
    float key_scale, value_scale;  // of schemes without scales of their own
};

static_assert(sizeof(Work) == 104 && offsetof(Work, sums) == 32 && offsetof(Work, packed) == 40, "as in src/cuda/args.rs");
static_assert(sizeof(AttendArgs) == 104 && offsetof(AttendArgs, heads) == 56 && offsetof(AttendArgs, scale) == 84, "as in src/cuda/args.rs");

// The row of q, out and lse of a column.
__device__ __forceinline__ long long row_of(const AttendArgs& args, const Work& work, int column) {
    return (long long)(work.first_token + column % work.queries) * args.heads + work.kv_head * args.heads_per_kv + column / work.queries;
}

__device__ __forceinline__ int entries_of(const Work& work) { return work.packed + work.residual - work.holes; }

// The bits and the count of 32 slots, of which the first is a multiple of 32.
__device__ __forceinline__ uint2 live_at(const Work& work, int slot) {
    return slot < work.live_slots ? __ldg(work.live + slot / 32) : make_uint2(FULL, slot - work.holes);
}

// The number of the entry in one of 32 slots; -1 for a hole.
__device__ __forceinline__ int entry_in(uint2 live, int i) { return live.x >> i & 1 ? int(live.y) + __popc(live.x & ((1u << i) - 1)) : -1; }

constexpr int ROTATED_KEYS = 1, ROTATED_VALUES = 2;
constexpr int MAX_SPLITS = 127;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float load_as_float(const void* p, long long i, int kind) {
    return kind ? __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]) : __half2float(static_cast<const __half*>(p)[i]);
}

// Two neighbours as f16; i is even.
__device__ __forceinline__ uint32_t load_pair(const void* p, long long i, int kind) {
    uint32_t x = *reinterpret_cast<const uint32_t*>(static_cast<const __half*>(p) + i);
    return kind ? bits(__float22half2_rn(__bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x)))) : x;
}

__device__ __forceinline__ void store(void* p, long long i, int kind, float x) {
    if (kind == 2) static_cast<float*>(p)[i] = x;
    else if (kind == 1) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(x);
    else static_cast<__half*>(p)[i] = __float2half(x);
}

}  // namespace kvq

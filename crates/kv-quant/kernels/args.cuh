// The arguments of the attention kernels, and conversions of f16 and bf16 elements.
#pragma once
#include <cuda_bf16.h>
#include <cstddef>
#include "ptx.cuh"

namespace kvq {

// The memory of a sequence's kv head. Mirrored by `KvHead` in src/cuda/args.rs.
struct KvHead {
    unsigned long long* table;  // block table: record addresses
    void* ring_k;               // ring buffer [ring, D], f16 or bf16
    void* ring_v;
    const uint2* valid;  // per 32 slots: a bit per entry, number of earlier entries; null: no holes
};

static_assert(sizeof(KvHead) == 32 && offsetof(KvHead, valid) == 24, "as in src/cuda/args.rs");

// The work item of a thread block: some records of a sequence's kv head, or its ring, for 8 N
// columns. The host makes the list of items, and splits long sequences over more thread blocks than
// short ones. Items without queries are skipped, so a list may have unused items at its end.
// Mirrored by `Work` in src/cuda/args.rs.
//
// Slots are the token positions of a kv head: first those in records, then those in the ring. A
// slot whose entry was evicted or is not selected is a hole. Entries are the other slots, numbered
// in order.
struct Work {
    long long sums;    // offset of the kv head's sums in `out`, for sums.cuh
    int head;          // index in `kv_heads`
    int packed;        // slots in records; later slots of the last record are not visible
    int residual;      // slots in the ring, newer than the packed ones
    int ring_start;    // ring position of the oldest one
    int kv_head;
    int queries;       // queries of the sequence
    int first_token;   // token index in q of the first query
    int first_column;  // column c is query c % queries of the kv head's query head c / queries
    int from, to;      // records of this item; from < 0: the ring
    int first_part;    // first partial result of this kv head and block of columns
    int part, parts;   // index and number of the partial results
    int merge;          // index in `arrived`
    int valid_slots;    // slots that `valid` covers, a multiple of 32; later slots have no holes
    int holes;
};

// Mirrored by `AttendArgs` in src/cuda/args.rs.
struct AttendArgs {
    const void* q;      // [tokens, heads, D], f16 or bf16, contiguous
    void* out;          // [tokens, heads, D], of dtype `out_kind`
    float* lse;         // [tokens, heads], natural logarithm; may be null. sums.cuh reads it
    float* part_out;    // [parts, columns, D]
    float* part_lse;    // [parts, columns], in base 2
    unsigned* arrived;  // per merge: 0 before and after the launch
    const Work* work;   // one per thread block; in sums.cuh, one per kv head of a sequence
    const KvHead* kv_heads;  // of all sequences
    int heads, heads_per_kv;
    int ring;        // capacity of a ring
    int causal;      // 1: the last entries of a sequence belong to its queries
    int window;      // sliding window, with `causal`; 0: none
    int kind;        // dtype of q and the rings: 0 f16, 1 bf16
    int out_kind;    // 0 f16, 1 bf16, 2 f32
    float scale;     // softmax scale
    float soft_cap;  // 0: none
    int rotated;     // bit 0: packed keys are rotated, bit 1: packed values are rotated
    float key_scale, value_scale;  // the scales of schemes without stored scales
};

static_assert(sizeof(Work) == 72 && offsetof(Work, head) == 8 && offsetof(Work, holes) == 68, "as in src/cuda/args.rs");
static_assert(sizeof(AttendArgs) == 112 && offsetof(AttendArgs, heads) == 64 && offsetof(AttendArgs, scale) == 92, "as in src/cuda/args.rs");

// A work item and its kv head's memory.
struct HeadWork : Work, KvHead {
    __device__ __forceinline__ HeadWork(const AttendArgs& args, int i) : Work(args.work[i]), KvHead(args.kv_heads[head]) {}
};

// Returns the row of q, out and lse for a column.
__device__ __forceinline__ long long row_of(const AttendArgs& args, const Work& work, int column) {
    return (long long)(work.first_token + column % work.queries) * args.heads + work.kv_head * args.heads_per_kv + column / work.queries;
}

__device__ __forceinline__ int entries_of(const Work& work) { return work.packed + work.residual - work.holes; }

// Returns the bits and the count of 32 slots. The first slot is a multiple of 32.
__device__ __forceinline__ uint2 valid_at(const HeadWork& work, int slot) {
    return slot < work.valid_slots ? __ldg(work.valid + slot / 32) : make_uint2(FULL, slot - work.holes);
}

// Returns the number of the entry in one of 32 slots; -1 for a hole.
__device__ __forceinline__ int entry_in(uint2 valid, int i) { return valid.x >> i & 1 ? int(valid.y) + __popc(valid.x & ((1u << i) - 1)) : -1; }

constexpr int ROTATED_KEYS = 1, ROTATED_VALUES = 2;
constexpr int MAX_SPLITS = 127;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float load_as_float(const void* p, long long i, int kind) {
    return kind ? __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]) : __half2float(static_cast<const __half*>(p)[i]);
}

// Loads eight adjacent elements of 16 bits; i is a multiple of 8.
__device__ __forceinline__ uint4 load_eight(const void* p, long long i) { return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i); }

// Converts eight elements of a kind to f16.
__device__ __forceinline__ uint4 to_f16(uint4 x, int kind) {
    if (kind) x = make_uint4(f16_of_bf16(x.x), f16_of_bf16(x.y), f16_of_bf16(x.z), f16_of_bf16(x.w));
    return x;
}

__device__ __forceinline__ void store(void* p, long long i, int kind, float x) {
    if (kind == 2) static_cast<float*>(p)[i] = x;
    else if (kind == 1) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(x);
    else static_cast<__half*>(p)[i] = __float2half(x);
}

}  // namespace kvq

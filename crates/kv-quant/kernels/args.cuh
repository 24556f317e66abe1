// What an attention kernel is given, and how it reads and writes numbers of either 16-bit kind.
#pragma once
#include <cuda_bf16.h>
#include "ptx.cuh"

namespace kvq {

// Mirrored by `AttendArgs` in src/cuda/args.rs.
struct AttendArgs {
    const void* q;                // [batch, heads, queries, D], f16 or bf16, contiguous
    const unsigned char* packed;  // [batch, kv_heads] rows of records, each `packed_stride` bytes
    const void* residual_k;       // [batch, kv_heads] rings of `ring` tokens, D channels each; f16 or bf16
    const void* residual_v;
    void* out;                    // [batch, heads, queries, D], as `out_kind` says
    float* lse;                   // [batch, heads, queries], natural logarithm; may be null. mass.cuh reads it
    float* part_out;              // [batch * kv_heads * blocks of columns, splits, columns, D]
    float* part_lse;              // [batch * kv_heads * blocks of columns, splits, columns], in base 2
    unsigned* arrived;            // [batch * kv_heads * blocks of columns], zero before and after
    const int* lens;              // {packed, residual, start of the ring} on the device, or null: take the three below
    long long packed_stride;
    int packed_len;    // tokens in records; the last record may hold more, which are not seen
    int residual_len;  // tokens in the ring, newer than the packed ones
    int ring_start;    // the oldest one's place
    int ring;          // places in the ring
    int kv_heads, heads_per_kv, queries;
    int splits;        // blocks that share one kv head's packed tokens, up to MAX_SPLITS; a last one takes the residual
    int causal;        // the last `queries` tokens are the queries' own
    int window;        // tokens that a query sees up to its own, with `causal`; 0: all
    int kind;          // of q and the residual: 0 f16, 1 bf16
    int out_kind;      // 0 f16, 1 bf16, 2 f32
    float scale;       // of the scores
    float soft_cap;    // 0: none
};

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

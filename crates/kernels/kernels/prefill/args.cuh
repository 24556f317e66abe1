// Arguments of the prefill kernels, mirrored by `PrefillArgs` in src/prefill.rs.
#pragma once
#include <cstddef>
#include <cstdint>

// Tokens of a block of a paged cache.
constexpr int PAGE = 64;

// Addresses are device addresses. Strides count elements. q, k, v and all their rows start at
// multiples of 16 bytes. Sizes that change between replays of a CUDA graph (sequence lengths, block
// tables) are in device memory.
struct PrefillArgs {
    uint64_t q;             // [tokens, heads, head_dim], f16 or bf16
    uint64_t k, v;          // [kv_extent, kv_heads, head_dim]; paged: [kv_extent blocks, PAGE, head_dim]
    uint64_t out;           // [tokens, heads, head_dim], contiguous, in the dtype of q or f32
    uint64_t lse;           // [tokens, heads], contiguous, f32, natural logarithm; -inf if no key is visible
    uint64_t cu_seqlens_q;  // [seqs + 1], u32
    uint64_t cu_seqlens_k;  // [seqs + 1], u32; unused if paged
    uint64_t seqlens_k;     // [seqs, kv_heads], u32; paged only
    uint64_t block_table;   // [seqs, kv_heads, blocks], u32; 0: k and v are contiguous
    int64_t q_token, q_head;
    int64_t k_token, k_head;  // Paged: k_head is the stride of a block
    int64_t v_token, v_head;
    int64_t table_seq, table_head;
    int64_t lens_seq, lens_head;
    int32_t seqs, tokens, kv_extent;
    int32_t heads, kv_heads;
    int32_t pack;      // Query heads per tile: a divisor of heads / kv_heads, at most the tile's rows
    int32_t causal;    // 1: a query sees no key after its own position
    int32_t past;      // 0: the last keys of a sequence are its queries' own; 1: all keys precede the queries
    int32_t window;    // A query sees the `window` keys up to its own position; 0: no limit
    float scale;       // Of the dot products; positive
    float soft_cap;    // Scores become soft_cap * tanh(score / soft_cap); 0: no soft cap
    int32_t out_f32;   // 0: out has the dtype of q; 1: f32
};
static_assert(sizeof(PrefillArgs) == 200 && offsetof(PrefillArgs, q_token) == 72 && offsetof(PrefillArgs, seqs) == 152 &&
                  offsetof(PrefillArgs, scale) == 188,
              "as in src/prefill.rs");

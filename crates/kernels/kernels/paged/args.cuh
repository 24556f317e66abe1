// Arguments of the kernels over paged keys and values, mirrored in src/paged.rs.
//
// A block holds PAGE entries of one kv head: keys [PAGE, D], then values [PAGE, D]. A block table
// lists the addresses of a kv head's blocks. Lists, tables and lengths are in device memory, so
// that a captured CUDA graph can be replayed with others.
//
// Lists of attention and append name a block table by its index in `tables`, [sequences *
// kv_heads]. So layers whose sequences have equal lengths share the lists of a step, and only
// `tables` differs.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>
#include <cstdint>

constexpr int PAGE = 64;
constexpr float LOG2E = 1.4426950408889634f;

// A range of a kv head's entries for some columns. Column c is query c % queries of query head c /
// queries of the kv head. Work with `queries` 0 is skipped, so a list may have unused items at its
// end.
struct AttendWork {
    const uint32_t* entries;  // indices of the selected entries, increasing; null: all
    int table;                // index of the kv head's block table
    int len;                  // number of entries, or of selected ones
    int from, to;             // range that this thread block reads; `from` is a multiple of TILE
    int first_part;           // first partial result of this kv head and block of columns
    int part, parts;          // index and number of the partial results
    int merge;                // index in `arrived`
    int kv_head, queries;
    int first_token;  // the sequence's first query
    int first_column;
    int unused[2];
};

struct AttendArgs {
    const void* q;                          // [tokens, heads, D], in the dtype of keys and values
    void* out;                              // [tokens, heads, D], of dtype `out_kind`
    float* lse;                             // [tokens, heads], natural logarithm; may be null
    float *part_out, *part_max, *part_sum;  // [parts, columns, D], [parts, columns], [parts, columns]
    unsigned* arrived;                      // per merge: 0 before and after the launch
    const AttendWork* work;                 // one for each thread block
    const uint64_t* const* tables;
    int heads, heads_per_kv;
    int causal, window;  // 1: the last `queries` entries are the queries' own; sliding window (0: none)
    float scale, soft_cap;  // soft_cap 0: none
    int head_dim;
    int out_kind;  // 0 f16, 1 bf16, 2 f32
    float* scores;  // output: [tokens, heads, scores_row], in units of log 2; may be null
    int scores_row;  // at least the largest `len`
    int early;       // 1: may read entries before the last `queries` ones while the launch before runs, an append
};

// A kv head's keys and the queries of its sequence.
struct SumsWork {
    const uint64_t* table;  // null: keys are the rows of `keys`
    const void* keys;
    int64_t stride;  // in elements, from a row to the next
    int64_t out;     // offset of the sums [heads_per_kv, len]
    int len;
    int kv_head, queries, first_token;
};

struct SumsArgs {
    const void* q;     // [tokens, heads, D]
    const float* lse;  // [tokens, heads], log-sum-exp over all entries that the query sees
    float* out;
    const SumsWork* work;  // one for each kv head of each sequence
    int heads, heads_per_kv;
    int causal, window;
    float scale, soft_cap;
};

// Tokens of a call that are appended to a kv head.
struct AppendRow {
    const uint32_t* tokens;  // indices of the tokens to append, in the sequence's own; null: all
    int table;               // index of the kv head's block table
    int kv_head;
    int first_token;  // the sequence's first token in this call
    int seqlen;       // number of the sequence's tokens in this call
    int first, count;              // index of the first new entry; number of new entries
    int first_new_block, new_block_count;  // block table index of the first new block; number of new blocks
    int new_blocks;                        // index of the first new block's address in `new_blocks`
    int unused;
};

struct AppendArgs {
    const void *k, *v;  // [tokens, kv_heads, D]
    const AppendRow* rows;
    uint64_t* const* tables;
    const uint64_t* new_blocks;  // addresses of new blocks; the kernel writes them to the tables
    int64_t k_token, k_head, v_token, v_head;  // strides in pieces of 16 bytes
    int pieces;                                // pieces of 16 bytes in a row
    int unused;
};

// Entries that are moved, in order. Where both tables contain the same block, no entry moves to a
// later position in it.
struct MoveRow {
    const uint64_t *from, *to;  // block tables
    const uint32_t* entries;
    int first, count;  // index of the first destination; number of entries
    int len, unused;   // number of entries in `from`
};

struct MoveArgs {
    const MoveRow* rows;
    int pieces;
    int unused;
};

// A kv head, of which the entry with the lowest score is evicted.
struct EvictRow {
    const float* previous;      // [scored]: scores to add to those of the first entries
    const uint32_t* positions;  // [placed]: positions of the first entries; entry placed + i has next + i
    float* kept_scores;         // output: [len - 1]; may be null
    uint32_t* kept_positions;   // output: [len - 1]
    int table;                  // index of the kv head's block table
    int kv_head, token;
    int len, scored, placed;
    uint32_t next;
    int sinks, recent;  // entries at the first and last positions always stay; their sum is less than `len`
    int layer;          // 1: all query heads are reduced; 0: those of the kv head
    int maximum;        // 1: reduced to the maximum; 0: to the mean
    int unused;
};

struct EvictArgs {
    const float* scores;  // [tokens, heads, scores_row], those of attention
    const float* lse;     // [tokens, heads]
    const EvictRow* rows;
    const uint64_t* const* tables;
    int heads, heads_per_kv;
    int scores_row;
    int pieces;  // pieces of 16 bytes in a row
    int count;   // number of rows
    int unused;
};

// The evictions of several layers.
constexpr int EVICT_LAYERS = 32;
struct EvictLayers {
    EvictArgs layers[EVICT_LAYERS];
};

static_assert(sizeof(AttendWork) == 64 && offsetof(AttendWork, len) == 12, "as in src/paged.rs");
static_assert(sizeof(AttendArgs) == 120 && offsetof(AttendArgs, heads) == 72 && offsetof(AttendArgs, scale) == 88 && offsetof(AttendArgs, scores) == 104, "as in src/paged.rs");
static_assert(sizeof(SumsWork) == 48 && offsetof(SumsWork, stride) == 16 && offsetof(SumsWork, len) == 32, "as in src/paged.rs");
static_assert(sizeof(SumsArgs) == 56 && offsetof(SumsArgs, heads) == 32 && offsetof(SumsArgs, scale) == 48, "as in src/paged.rs");
static_assert(sizeof(AppendRow) == 48 && offsetof(AppendRow, first) == 24, "as in src/paged.rs");
static_assert(sizeof(AppendArgs) == 80 && offsetof(AppendArgs, k_token) == 40 && offsetof(AppendArgs, pieces) == 72, "as in src/paged.rs");
static_assert(sizeof(MoveRow) == 40 && offsetof(MoveRow, first) == 24 && sizeof(MoveArgs) == 16, "as in src/paged.rs");
static_assert(sizeof(EvictRow) == 80 && offsetof(EvictRow, table) == 32 && sizeof(EvictArgs) == 56 && offsetof(EvictArgs, heads) == 32, "as in src/paged.rs");

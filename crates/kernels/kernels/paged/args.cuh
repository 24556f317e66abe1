// Arguments of the kernels over paged keys and values, mirrored in src/paged.rs.
//
// A block holds PAGE entries of one kv head: keys [PAGE, D], then values [PAGE, D]. A block table
// lists the addresses of a kv head's blocks. Lists, tables and lengths are in device memory, so
// that a captured CUDA graph can be replayed with others.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>
#include <cstdint>

constexpr int PAGE = 64;
constexpr float LOG2E = 1.4426950408889634f;

// A range of a kv head's entries for some columns. Column c is query c % queries of query head c /
// queries of the kv head. Work and merges with `queries` 0 are skipped, so a list may have unused
// items at its end.
struct AttendWork {
    const uint64_t* table;
    const uint32_t* entries;  // indices of the selected entries, increasing; null: all
    int len;                  // number of entries, or of selected ones
    int from, to;             // range that this thread block reads
    int part;                 // index of its partial results
    int kv_head, queries;
    int first_token;  // the sequence's first query
    int first_column;
};

// The partial results of a kv head and some columns, which are consecutive.
struct AttendMerge {
    int first_part, parts;
    int kv_head, queries, first_token, first_column;
};

struct AttendArgs {
    const void* q;                          // [tokens, heads, D], in the dtype of keys and values
    float *out, *lse;                       // [tokens, heads, D] and [tokens, heads], natural logarithm
    float *part_out, *part_max, *part_sum;  // [parts, columns, D], [parts, columns], [parts, columns]
    const AttendWork* work;                 // one for each thread block
    const AttendMerge* merges;
    int heads, heads_per_kv;
    int columns;         // of a thread block
    int causal, window;  // 1: the last `queries` entries are the queries' own; sliding window (0: none)
    float scale, soft_cap;  // soft_cap 0: none
    int head_dim;
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

// Rows of a call that are appended to a kv head.
struct AppendRow {
    uint64_t* table;
    const uint64_t* new_blocks;  // addresses of new blocks; the kernel writes them to the table
    const uint32_t* tokens;  // indices of the tokens to append, in the sequence's own; null: all
    int64_t first_row;       // row of the sequence's first token; `stride` rows between tokens
    int first_new_block, new_block_count;  // index of the first new block; number of new blocks
    int first, count;              // index of the first new entry; number of new entries
    int seqlen, unused;            // number of the sequence's tokens in this call
};

struct AppendArgs {
    const void *k, *v;  // rows of D elements
    const AppendRow* rows;
    int64_t stride;
    int pieces;  // pieces of 16 bytes in a row
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

static_assert(sizeof(AttendWork) == 48 && offsetof(AttendWork, len) == 16 && sizeof(AttendMerge) == 24, "as in src/paged.rs");
static_assert(sizeof(AttendArgs) == 96 && offsetof(AttendArgs, heads) == 64 && offsetof(AttendArgs, scale) == 84, "as in src/paged.rs");
static_assert(sizeof(SumsWork) == 48 && offsetof(SumsWork, stride) == 16 && offsetof(SumsWork, len) == 32, "as in src/paged.rs");
static_assert(sizeof(SumsArgs) == 56 && offsetof(SumsArgs, heads) == 32 && offsetof(SumsArgs, scale) == 48, "as in src/paged.rs");
static_assert(sizeof(AppendRow) == 56 && offsetof(AppendRow, first_row) == 24, "as in src/paged.rs");
static_assert(sizeof(AppendArgs) == 40 && offsetof(AppendArgs, stride) == 24, "as in src/paged.rs");
static_assert(sizeof(MoveRow) == 40 && offsetof(MoveRow, first) == 24 && sizeof(MoveArgs) == 16, "as in src/paged.rs");

// Arguments of the kernels over paged keys and values, mirrored in src/cuda/paged.rs.
//
// A block holds PAGE entries of one kv head: keys [PAGE, D], then values [PAGE, D]. A block table lists the addresses of a kv head's blocks.
// Lists, tables and lengths lie in device memory, so that a captured launch serves others of as many pieces.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>
#include <cstdint>

constexpr int PAGE = 64;
constexpr float LOG2E = 1.4426950408889634f;

// A share of a kv head's entries for some columns: column c is query c % queries of the kv head's query head c / queries. One without
// queries is none, and so is a join: a list may be longer than it need be.
struct AttendWork {
    const uint64_t* table;
    const uint32_t* entries;  // those that are seen, in order; null: all
    int len;                  // how many there are, or are seen
    int from, to;             // those that this block of threads reads
    int part;                 // where its results lie
    int kv_head, queries;
    int first_token;  // of the sequence's queries
    int first_column;
};

// The parts of a kv head and some columns, one after the other.
struct AttendJoin {
    int first_part, parts;
    int kv_head, queries, first_token, first_column;
};

struct AttendArgs {
    const void* q;                          // [tokens, heads, D], in the format of keys and values
    float *out, *lse;                       // [tokens, heads, D] and [tokens, heads], natural logarithm
    float *part_out, *part_max, *part_sum;  // [parts, columns, D], [parts, columns] and the same
    const AttendWork* work;                 // one for each block of threads
    const AttendJoin* joins;
    int heads, heads_per_kv;
    int columns;         // of a block of threads
    int causal, window;  // the last `queries` entries are the queries' own; how many a query sees (0: all)
    float scale, soft_cap;  // soft_cap 0: none
    int head_dim;
};

// A kv head's keys beside the queries of its sequence.
struct SumsWork {
    const uint64_t* table;  // null: keys are the rows of `keys`
    const void* keys;
    int64_t stride;  // numbers from a row to the next
    int64_t out;     // where the sums [heads_per_kv, len] lie
    int len;
    int kv_head, queries, first_token;
};

struct SumsArgs {
    const void* q;     // [tokens, heads, D]
    const float* lse;  // [tokens, heads], of all that the queries see
    float* out;
    const SumsWork* work;  // one for each kv head of each sequence
    int heads, heads_per_kv;
    int causal, window;
    float scale, soft_cap;
};

// Rows of a call that go to the end of a kv head.
struct AppendRow {
    uint64_t* table;
    const uint64_t* fresh;  // addresses of blocks that are taken now; the kernel puts them into the table
    const uint32_t* tokens;  // those to take, of the sequence's own; null: all
    int64_t first_row;       // of the sequence's first token; the next token's is `stride` rows later
    int first_fresh, fresh_count;  // the first block that is taken now
    int first, count;              // the first entry, and how many
    int own, unused;               // the sequence's tokens in this call
};

struct AppendArgs {
    const void *k, *v;  // rows of D numbers
    const AppendRow* rows;
    int64_t stride;
    int pieces;  // of 16 bytes, in a row
    int unused;
};

// Entries that move to others, in order, none to a later place than its own where both tables name one block.
struct MoveRow {
    const uint64_t *from, *to;  // block tables
    const uint32_t* entries;
    int first, count;  // the entry that the first moves to
    int len, unused;   // entries that `from` holds
};

struct MoveArgs {
    const MoveRow* rows;
    int pieces;
    int unused;
};

static_assert(sizeof(AttendWork) == 48 && offsetof(AttendWork, len) == 16 && sizeof(AttendJoin) == 24, "as in src/cuda/paged.rs");
static_assert(sizeof(AttendArgs) == 96 && offsetof(AttendArgs, heads) == 64 && offsetof(AttendArgs, scale) == 84, "as in src/cuda/paged.rs");
static_assert(sizeof(SumsWork) == 48 && offsetof(SumsWork, stride) == 16 && offsetof(SumsWork, len) == 32, "as in src/cuda/paged.rs");
static_assert(sizeof(SumsArgs) == 56 && offsetof(SumsArgs, heads) == 32 && offsetof(SumsArgs, scale) == 48, "as in src/cuda/paged.rs");
static_assert(sizeof(AppendRow) == 56 && offsetof(AppendRow, first_row) == 24, "as in src/cuda/paged.rs");
static_assert(sizeof(AppendArgs) == 40 && offsetof(AppendArgs, stride) == 24, "as in src/cuda/paged.rs");
static_assert(sizeof(MoveRow) == 40 && offsetof(MoveRow, first) == 24 && sizeof(MoveArgs) == 16, "as in src/cuda/paged.rs");

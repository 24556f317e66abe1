// Scores the entries of kv heads, selects the best in order, and gathers what belongs to them.
#include <cstddef>
#include <cstdint>
#include "rank.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 256;

// One kv head of a sequence. The score of an entry is the reduction of its column of `scores`, plus
// its score in `previous`.
struct TopRow {
    const float* scores;        // [rows, len]
    const float* previous;      // [scored], of the first entries
    const uint32_t* positions;  // [placed], of the first entries; entry placed + i has next + i
    float* all_scores;          // output: [len]
    float* kept_scores;         // output: [count]
    uint32_t* kept;             // output: [count], increasing
    uint32_t* kept_positions;   // output: [count]
    int rows, len, scored, placed;
    uint32_t next;
    int count;
    int sinks, recent;  // entries at the first and last positions always stay; their sum is at most `count`
    int maximum;        // 1: the maximum of a column; 0: its mean
    int unused;
};

struct TopArgs {
    const TopRow* rows;
};

static_assert(sizeof(TopRow) == 96 && offsetof(TopRow, rows) == 56, "as in src/top.rs");
static_assert(sizeof(TopArgs) == 8, "as in src/top.rs");

// Returns the number of threads before this one whose flag is set. `total` is the number of all
// such threads. All threads of the block call it.
__device__ __forceinline__ int count_before(bool flag, int* warps, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t votes = __ballot_sync(~0u, flag);
    if (lane == 0) warps[warp] = __popc(votes);
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? warps[i] : 0;
        total += warps[i];
    }
    __syncthreads();
    return before + __popc(votes & ((1u << lane) - 1));
}

__device__ __forceinline__ uint64_t key_of(const TopRow& row, int entry) {
    return key_of(row, row.all_scores[entry], position_of(row, entry));
}

// Returns the key of the `wanted`-th best entry, or a lower one that only these reach: a radix
// selection, byte by byte from the highest.
__device__ uint64_t last_key(const TopRow& row, int wanted) {
    __shared__ int bins[BINS];
    __shared__ int found, left;
    __shared__ bool complete;  // all entries whose key begins with `key` are among the best
    uint64_t key = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.len; i += THREADS) {
            const uint64_t own = key_of(row, i);
            if ((own & mask) == key) atomicAdd(&bins[own >> shift & (BINS - 1)], 1);
        }
        __syncthreads();
        // bins[i]: the number of entries in bin i and the bins above.
        for (int step = 1; step < BINS; step *= 2) {
            const int above = threadIdx.x + step < BINS ? bins[threadIdx.x + step] : 0;
            __syncthreads();
            if (threadIdx.x < BINS) bins[threadIdx.x] += above;
            __syncthreads();
        }
        if (threadIdx.x < BINS) {
            const int above = threadIdx.x + 1 < BINS ? bins[threadIdx.x + 1] : 0;
            if (bins[threadIdx.x] >= wanted && above < wanted) {
                found = threadIdx.x;
                left = wanted - above;
                complete = bins[threadIdx.x] == wanted;
            }
        }
        __syncthreads();
        key |= uint64_t(found) << shift;
        mask |= uint64_t(BINS - 1) << shift;
        wanted = left;
        if (complete) break;
        __syncthreads();
    }
    return key;
}

// Returns the worst entry.
__device__ int worst_entry(const TopRow& row) {
    __shared__ unsigned long long worst;
    __shared__ int entry;
    if (threadIdx.x == 0) worst = ~0ull;
    __syncthreads();
    unsigned long long own = ~0ull;
    int own_entry = 0;
    for (int i = threadIdx.x; i < row.len; i += THREADS) {
        const unsigned long long key = key_of(row, i);
        if (key <= own) own = key, own_entry = i;
    }
    unsigned long long lowest = own;
    for (int lanes = 16; lanes > 0; lanes /= 2) lowest = min(lowest, __shfl_xor_sync(~0u, lowest, lanes));
    if (threadIdx.x % 32 == 0) atomicMin(&worst, lowest);
    __syncthreads();
    if (threadIdx.x < row.len && own == worst) entry = own_entry;
    __syncthreads();
    return entry;
}

__device__ float score_of(const TopRow& row, int i) {
    float score = row.scores[i];
    for (int r = 1; r < row.rows; r++) {
        const float other = row.scores[r * (long long)row.len + i];
        score = row.maximum ? fmaxf(score, other) : score + other;
    }
    if (row.rows > 1 && !row.maximum) score /= row.rows;
    return i < row.scored ? row.previous[i] + score : score;
}

__device__ __forceinline__ void keep_entry(const TopRow& row, int i, int place) {
    row.kept[place] = i;
    row.kept_scores[place] = row.all_scores[i];
    row.kept_positions[place] = position_of(row, i);
}

// Grid: one thread block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) top(const TopArgs a) {
    __shared__ int warps[WARPS];
    const TopRow& row = a.rows[blockIdx.x];
    for (int i = threadIdx.x; i < row.len; i += THREADS) row.all_scores[i] = score_of(row, i);
    __syncthreads();
    if (row.count == 0) return;
    if (row.count + 1 >= row.len) {
        // A decoded token: one entry is dropped at most.
        const int dropped = row.count < row.len ? worst_entry(row) : row.len;
        for (int i = threadIdx.x; i < row.len; i += THREADS)
            if (i != dropped) keep_entry(row, i, i - (i > dropped));
        return;
    }
    const uint64_t last = last_key(row, row.count);
    int kept = 0;
    for (int start = 0; start < row.len; start += THREADS) {
        const int i = start + threadIdx.x;
        const bool keep = i < row.len && key_of(row, i) >= last;
        int total;
        const int place = kept + count_before(keep, warps, total);
        if (keep) keep_entry(row, i, place);
        kept += total;
    }
}

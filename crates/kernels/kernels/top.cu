// Selects the entries with the highest scores of each head, in order, and gathers by them.
#include <cstddef>
#include <cstdint>

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 256;

struct TopArgs {
    const float* scores;  // [heads, len]
    uint32_t* out;        // [heads, count], increasing
    int len, count;
    int sinks, recent;  // first and last entries that always stay; their sum is at most `count`
};

struct GatherArgs {
    const uint32_t* from;     // [heads, len], elements of 4 bytes
    const uint32_t* entries;  // [heads, count]
    uint32_t* out;            // [heads, count]
    int len, count;
    uint32_t next;  // entry len + i has the value next + i
    int unused;
};

static_assert(sizeof(TopArgs) == 32 && offsetof(TopArgs, len) == 16, "as in src/top.rs");
static_assert(sizeof(GatherArgs) == 40 && offsetof(GatherArgs, len) == 24, "as in src/top.rs");

// Returns a number that is larger for a better score, in the order of f32::total_cmp. NaN counts as
// -inf.
__device__ __forceinline__ uint32_t rank_of(float score) {
    const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

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

// Returns the rank of the `wanted`-th best entry of first..end: a radix selection, byte by byte
// from the highest. `wanted` becomes the number of entries of this rank that are among the best.
__device__ uint32_t last_rank(const float* scores, int first, int end, int& wanted) {
    __shared__ int bins[BINS];
    __shared__ int found, left;
    uint32_t rank = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = first + threadIdx.x; i < end; i += THREADS) {
            const uint32_t own = rank_of(scores[i]);
            if ((own & mask) == rank) atomicAdd(&bins[own >> shift & (BINS - 1)], 1);
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
            }
        }
        __syncthreads();
        rank |= uint32_t(found) << shift;
        mask |= uint32_t(BINS - 1) << shift;
        wanted = left;
        __syncthreads();
    }
    return rank;
}

// Grid: one thread block for each head.
extern "C" __global__ void __launch_bounds__(THREADS) top(const TopArgs a) {
    __shared__ int warps[WARPS];
    const float* scores = a.scores + blockIdx.x * (long long)a.len;
    uint32_t* out = a.out + blockIdx.x * (long long)a.count;
    const int end = a.len - a.recent;
    int wanted = a.count - a.sinks - a.recent;
    const bool any = wanted > 0;
    const uint32_t rank = any ? last_rank(scores, a.sinks, end, wanted) : 0;
    int equal = 0, kept = 0;
    for (int start = 0; start < a.len; start += THREADS) {
        const int i = start + threadIdx.x;
        const bool inside = i < a.len, middle = inside && i >= a.sinks && i < end;
        const uint32_t own = middle && any ? rank_of(scores[i]) : 0;
        const bool ties = middle && any && own == rank;
        int total;
        // Of equal scores, the older entries stay.
        const bool early = equal + count_before(ties, warps, total) < wanted;
        equal += total;
        const bool keep = inside && (!middle || (any && (own > rank || (ties && early))));
        const int place = kept + count_before(keep, warps, total);
        if (keep) out[place] = i;
        kept += total;
    }
}

// Grid: (count / THREADS rounded up, heads).
extern "C" __global__ void __launch_bounds__(THREADS) gather(const GatherArgs a) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.count) return;
    const uint32_t entry = a.entries[blockIdx.y * (long long)a.count + i];
    const bool held = entry < uint32_t(a.len);
    a.out[blockIdx.y * (long long)a.count + i] = held ? a.from[blockIdx.y * (long long)a.len + entry] : a.next + (entry - a.len);
}

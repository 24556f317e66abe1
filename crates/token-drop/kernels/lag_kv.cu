// Scores of LagKV: the rank of each entry within its partition, by the spread of its key and its
// value relative to the range of the next partition.
#include <cstddef>
#include <cstdint>

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct LagKvArgs {
    const float* keys;    // [kv_heads, entries, key_channels]
    const float* values;  // [kv_heads, entries, value_channels]
    float* scores;        // Output: [kv_heads, entries]; only scored partitions are written
    int entries, sinks;   // Partitions begin after `sinks` entries
    int lag;              // Entries of a partition
    int key_channels, value_channels;
    int padding;
};

static_assert(sizeof(LagKvArgs) == 48 && offsetof(LagKvArgs, entries) == 24, "as in src/policy/lag_kv/on_device.rs");

struct Sum {
    static __device__ float join(float a, float b) { return a + b; }
};
struct Max {
    static __device__ float join(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ __forceinline__ float reduce_warp(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = Op::join(x, __shfl_xor_sync(~0u, x, i));
    return x;
}

// Reduces over the thread block. All threads call it and have the result.
template <class Op>
__device__ __forceinline__ float reduce_block(float x, float* warps) {
    x = reduce_warp<Op>(x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    float all = warps[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) all = Op::join(all, warps[i]);
    __syncthreads();
    return all;
}

// Writes each channel's minimum over the reference rows, and the reciprocal of its range. A range
// of zero width has the factor 0.
__device__ void ranges(const float* reference, int lag, int channels, float* low, float* factor) {
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        float least = reference[c], most = least;
#pragma unroll 8
        for (int row = 1; row < lag; row++) {
            const float x = reference[row * (long long)channels + c];
            least = fminf(least, x);
            most = fmaxf(most, x);
        }
        low[c] = least;
        factor[c] = most > least ? 1.f / (most - least) : 0.f;
    }
}

// Returns the standard deviation over the channels of one row, scaled. All lanes have it.
__device__ float spread(const float* row, int channels, const float* low, const float* factor) {
    const int lane = threadIdx.x % 32;
    float sum = 0.f, squares = 0.f;
    for (int c = lane; c < channels; c += 32) sum += (row[c] - low[c]) * factor[c];
    const float mean = reduce_warp<Sum>(sum) / channels;
    for (int c = lane; c < channels; c += 32) {
        const float x = (row[c] - low[c]) * factor[c] - mean;
        squares = fmaf(x, x, squares);
    }
    return sqrtf(reduce_warp<Sum>(squares) / (channels - 1));
}

// Adds the softmax of the rows' spreads to `total`.
__device__ void add_spreads(const float* rows, int lag, int channels, float* low, float* factor, float* spreads, float* total) {
    __shared__ float warps[WARPS];
    ranges(rows + lag * (long long)channels, lag, channels, low, factor);
    __syncthreads();
    for (int row = threadIdx.x / 32; row < lag; row += WARPS) {
        const float s = spread(rows + row * (long long)channels, channels, low, factor);
        if (threadIdx.x % 32 == 0) spreads[row] = s;
    }
    __syncthreads();
    float most = -INFINITY, sum = 0.f;
    for (int row = threadIdx.x; row < lag; row += THREADS) most = fmaxf(most, spreads[row]);
    most = reduce_block<Max>(most, warps);
    for (int row = threadIdx.x; row < lag; row += THREADS) sum += expf(spreads[row] - most);
    sum = reduce_block<Sum>(sum, warps);
    for (int row = threadIdx.x; row < lag; row += THREADS) total[row] += expf(spreads[row] - most) / sum;
    __syncthreads();
}

// Grid: (scored partitions, kv_heads). Shared memory: 2 * (lag + the larger number of channels)
// floats.
extern "C" __global__ void __launch_bounds__(THREADS) lag_kv(const LagKvArgs a) {
    extern __shared__ float shared[];
    const int channels = max(a.key_channels, a.value_channels);
    float *low = shared, *factor = low + channels, *spreads = factor + channels, *total = spreads + a.lag;
    const long long first = blockIdx.y * (long long)a.entries + a.sinks + blockIdx.x * (long long)a.lag;
    for (int row = threadIdx.x; row < a.lag; row += THREADS) total[row] = 0.f;
    add_spreads(a.keys + first * a.key_channels, a.lag, a.key_channels, low, factor, spreads, total);
    add_spreads(a.values + first * a.value_channels, a.lag, a.value_channels, low, factor, spreads, total);
    for (int row = threadIdx.x; row < a.lag; row += THREADS) {
        int rank = 0;
        for (int other = 0; other < a.lag; other++) rank += total[other] < total[row] || (total[other] == total[row] && other < row);
        a.scores[first + row] = float(rank) / a.lag;
    }
}

// The index of the largest number of each row: greedy sampling.
#include <cstddef>
#include <cstdint>

struct ArgmaxArgs {
    uint64_t x;       // [rows, columns], f32, contiguous
    uint64_t out;     // Output [rows], u32
    int64_t columns;  // 1 to 2^32 - 2
};
static_assert(sizeof(ArgmaxArgs) == 24 && offsetof(ArgmaxArgs, columns) == 16, "as in src/argmax.rs");

constexpr int THREADS = 1024;
constexpr uint32_t NONE = ~0u;

// Returns a number's key: the order of keys is the total order of numbers, and a lower index comes
// first among equal ones.
__device__ __forceinline__ uint64_t key_of(float x, uint32_t index) {
    const uint32_t bits = __float_as_uint(x);
    return uint64_t(bits ^ (bits >> 31 ? ~0u : 1u << 31)) << 32 | (NONE - index);
}

// Grid: one thread block for each row. A row with NaN has the output 2^32 - 1.
extern "C" __global__ void __launch_bounds__(THREADS) argmax(const ArgmaxArgs a) {
    __shared__ uint64_t keys[THREADS / 32];
    const float* x = reinterpret_cast<const float*>(a.x) + blockIdx.x * a.columns;
    uint64_t best = 0;
    bool nan = false;
    auto compare = [&](float value, int64_t i) {
        nan |= isnan(value);
        best = max(best, key_of(value, uint32_t(i)));
    };
    // One thread block cannot have enough loads in flight with single numbers.
    const int64_t pieces = reinterpret_cast<uintptr_t>(x) % 16 ? 0 : a.columns / 4;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < pieces; i += THREADS) {
        const float4 piece = reinterpret_cast<const float4*>(x)[i];
        compare(piece.x, 4 * i), compare(piece.y, 4 * i + 1), compare(piece.z, 4 * i + 2), compare(piece.w, 4 * i + 3);
    }
    for (int64_t i = 4 * pieces + threadIdx.x; i < a.columns; i += THREADS) compare(x[i], i);
    nan = __syncthreads_or(nan);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) best = max(best, __shfl_xor_sync(~0u, best, i));
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = keys[threadIdx.x];
#pragma unroll
    for (int i = 16; i > 0; i /= 2) best = max(best, __shfl_xor_sync(~0u, best, i));
    if (threadIdx.x == 0) reinterpret_cast<uint32_t*>(a.out)[blockIdx.x] = nan ? NONE : NONE - uint32_t(best);
}

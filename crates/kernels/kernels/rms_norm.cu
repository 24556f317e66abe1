// The sum of two activations and its RMS norm in one pass, as between the blocks of a decoder.
#include <cstddef>
#include <cstdint>
#include <dependent.cuh>
#include "half.cuh"

// Addresses are device addresses. All arrays are [rows, columns] in f16 or bf16, contiguous.
struct RmsNormArgs {
    uint64_t x;
    uint64_t y;       // 0: none
    uint64_t weight;  // [columns]
    uint64_t sum;     // Output: x + y; 0 if y is 0
    uint64_t out;     // Output: the norm of the sum, times weight
    int32_t columns;  // A multiple of 8
    float eps;
};
static_assert(sizeof(RmsNormArgs) == 48 && offsetof(RmsNormArgs, columns) == 40, "as in src/rms_norm.rs");

constexpr int THREADS = 512;

// Grid: one thread block for each row.
template <class Pair>
__device__ __forceinline__ void rms_norm(const RmsNormArgs& a) {
    __shared__ float squares[THREADS / 32];
    const int pieces = a.columns / 8;
    const int64_t row = int64_t(blockIdx.x) * pieces;
    const uint4 *x = reinterpret_cast<const uint4*>(a.x) + row, *y = reinterpret_cast<const uint4*>(a.y) + row;
    uint4 *sum = reinterpret_cast<uint4*>(a.sum) + row, *out = reinterpret_cast<uint4*>(a.out) + row;
    start_next_kernel();
    wait_for_previous_kernel();
    float square = 0.f;
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        uint4 piece = x[i];
        Pair* pairs = reinterpret_cast<Pair*>(&piece);
        if (a.y) {
            const uint4 other = y[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 s = widen(pairs[j]), t = widen(reinterpret_cast<const Pair*>(&other)[j]);
                narrow(pairs[j], make_float2(s.x + t.x, s.y + t.y));
            }
            sum[i] = piece;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 s = widen(pairs[j]);
            square = fmaf(s.x, s.x, fmaf(s.y, s.y, square));
        }
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    float all = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) all += squares[i];
    const float scale = rsqrtf(all / a.columns + a.eps);
    // Each thread reads the pieces of the sum that it wrote, so no barrier is needed.
    const uint4 *from = a.y ? sum : x, *weight = reinterpret_cast<const uint4*>(a.weight);
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        uint4 piece = from[i];
        const uint4 w = weight[i];
        Pair* pairs = reinterpret_cast<Pair*>(&piece);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 s = widen(pairs[j]), t = widen(reinterpret_cast<const Pair*>(&w)[j]);
            narrow(pairs[j], make_float2(s.x * scale * t.x, s.y * scale * t.y));
        }
        out[i] = piece;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_f16(const RmsNormArgs a) { rms_norm<__half2>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_bf16(const RmsNormArgs a) { rms_norm<__nv_bfloat162>(a); }

// Multiplies a few rows of activations by a weight matrix, as decode steps do. Reading the matrix
// takes most of the time.
#include <cstddef>
#include <cstdint>
#include "half.cuh"

// Addresses are device addresses. All arrays are contiguous, in f16 or bf16.
struct MatVecArgs {
    uint64_t w;  // [out, inner]
    uint64_t x;  // [rows, inner]
    uint64_t y;  // Output: [rows, out]
    int32_t inner;  // A multiple of 8
    int32_t out;
    int32_t rows;  // At most the kernel's COUNT
    int32_t unused;
};
static_assert(sizeof(MatVecArgs) == 40 && offsetof(MatVecArgs, inner) == 24, "as in src/matvec.rs");

constexpr int THREADS = 128, WARPS = THREADS / 32;

// Loads weights, which are read once, without displacing x from the L1 cache.
__device__ __forceinline__ uint4 stream(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// A warp computes OUTPUTS outputs, so that they share the reads of x. Each thread has 8 loads of
// weights in flight. Grid: out / (WARPS * OUTPUTS), rounded up.
template <class Pair, class One, int COUNT, int OUTPUTS>
__device__ __forceinline__ void matvec(const MatVecArgs& a) {
    constexpr int STEPS = 8 / OUTPUTS;
    const int lane = threadIdx.x % 32, first = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
    if (first >= a.out) return;
    const int pieces = a.inner / 8;
    const uint4 *w[OUTPUTS], *x[COUNT];
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) w[o] = reinterpret_cast<const uint4*>(a.w) + int64_t(min(first + o, a.out - 1)) * pieces;
#pragma unroll
    for (int r = 0; r < COUNT; r++) x[r] = reinterpret_cast<const uint4*>(a.x) + int64_t(min(r, a.rows - 1)) * pieces;
    float sums[COUNT][OUTPUTS] = {};
    for (int start = lane; start < pieces; start += 32 * STEPS) {
        uint4 weights[STEPS][OUTPUTS];
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) weights[s][o] = start + 32 * s < pieces ? stream(w[o] + start + 32 * s) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            // x must not be read beyond its end: zero times NaN or infinity would be NaN.
            if (start + 32 * s >= pieces) break;
            float wide[OUTPUTS][8];
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) widen<Pair>(wide[o], weights[s][o]);
#pragma unroll
            for (int r = 0; r < COUNT; r++) {
                float row[8];
                widen<Pair>(row, __ldg(x[r] + start + 32 * s));
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                    for (int i = 0; i < 8; i++) sums[r][o] = fmaf(row[i], wide[o][i], sums[r][o]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < COUNT; r++)
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
#pragma unroll
            for (int i = 16; i > 0; i /= 2) sums[r][o] += __shfl_xor_sync(~0u, sums[r][o], i);
            if (lane == 0 && r < a.rows && first + o < a.out) narrow(reinterpret_cast<One*>(a.y)[int64_t(r) * a.out + first + o], sums[r][o]);
        }
}

#define KERNEL(NAME, PAIR, ONE, ROWS, OUTPUTS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) matvec_##NAME##_r##ROWS##_o##OUTPUTS(const MatVecArgs a) { \
        matvec<PAIR, ONE, ROWS, OUTPUTS>(a);                                                                                        \
    }
#define FORMATS(ROWS, OUTPUTS) KERNEL(f16, __half2, __half, ROWS, OUTPUTS) KERNEL(bf16, __nv_bfloat162, __nv_bfloat16, ROWS, OUTPUTS)
#define ROWS(OUTPUTS) FORMATS(1, OUTPUTS) FORMATS(2, OUTPUTS) FORMATS(4, OUTPUTS)
ROWS(2)
ROWS(4)

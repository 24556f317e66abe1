// silu(gate) * up, the activation of a gated feed-forward block, in one pass over memory.
#include <cstddef>
#include <cstdint>
#include "half.cuh"

// Addresses are device addresses; strides count elements. All rows begin at multiples of 16 bytes.
struct SiluMulArgs {
    uint64_t gate, up;  // [rows, columns], f16 or bf16
    uint64_t out;       // [rows, columns], contiguous
    int64_t gate_row, up_row;
    int64_t rows, columns;  // columns: a multiple of 8
};
static_assert(sizeof(SiluMulArgs) == 56 && offsetof(SiluMulArgs, rows) == 40, "as in src/silu_mul.rs");

// Eight columns per thread; any grid.
template <class Pair>
__device__ __forceinline__ void silu_mul(const SiluMulArgs& a) {
    const int64_t pieces = a.columns / 8;
    const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, step = gridDim.x * int64_t(blockDim.x);
    for (int64_t i = first; i < a.rows * pieces; i += step) {
        const int64_t row = i / pieces, piece = i % pieces;
        const uint4 g = reinterpret_cast<const uint4*>(a.gate)[row * (a.gate_row / 8) + piece];
        const uint4 u = reinterpret_cast<const uint4*>(a.up)[row * (a.up_row / 8) + piece];
        uint4 y;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 gate = widen(reinterpret_cast<const Pair*>(&g)[j]), up = widen(reinterpret_cast<const Pair*>(&u)[j]);
            narrow(reinterpret_cast<Pair*>(&y)[j], make_float2(silu(gate.x) * up.x, silu(gate.y) * up.y));
        }
        reinterpret_cast<uint4*>(a.out)[i] = y;
    }
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_f16(const SiluMulArgs a) { silu_mul<__half2>(a); }
extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const SiluMulArgs a) { silu_mul<__nv_bfloat162>(a); }

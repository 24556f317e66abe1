// The orthonormal Walsh-Hadamard transform of a row of D numbers, which is its own inverse. Results
// equal src/hadamard.rs bit for bit.
#pragma once
#include "ptx.cuh"

namespace kvq {

// Lane l of a warp has the numbers 32 i + l.
template <int D>
__device__ __forceinline__ void hadamard(float (&x)[D / 32], int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(FULL, x[i], step));
    }
#pragma unroll
    for (int step = 1; step < D / 32; step *= 2)
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            if (!(i & step)) {
                float low = x[i], high = x[i + step];
                x[i] = low + high, x[i + step] = low - high;
            }
    const float norm = __frcp_rn(__fsqrt_rn(float(D)));
#pragma unroll
    for (int i = 0; i < D / 32; i++) x[i] *= norm;
}

}  // namespace kvq

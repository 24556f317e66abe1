// Exact attention of many queries: variable lengths, grouped queries, causal masks, sliding
// windows, soft caps, over contiguous or paged keys and values, with log-sum-exp. See prefill/.
//
// prefill_wgmma_{f16,bf16}_d{64,80,96,128,192,256} has code only for compute capability 9.0a,
// prefill_mma_* for all others.
#include "prefill/prefill_mma.cuh"
#include "prefill/prefill_wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA_BODY(TYPE, D) prefill_wgmma<TYPE, D>(a, &q, &k, &v)
#define MMA_BODY(TYPE, D)
#else
#define WGMMA_BODY(TYPE, D)
#define MMA_BODY(TYPE, D) prefill_mma<TYPE, D>(a)
#endif

#define KERNELS(NAME, TYPE, D)                                                                                      \
    extern "C" __global__ void __launch_bounds__(WgmmaShape<D>::THREADS, 1)                                         \
        prefill_wgmma_##NAME##_d##D(const __grid_constant__ PrefillArgs a, const __grid_constant__ CUtensorMap q,   \
                                    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v) { \
        WGMMA_BODY(TYPE, D);                                                                                        \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS)                                                       \
        prefill_mma_##NAME##_d##D(const __grid_constant__ PrefillArgs a) {                                          \
        MMA_BODY(TYPE, D);                                                                                          \
    }
#define TYPES(D) KERNELS(f16, __half, D) KERNELS(bf16, __nv_bfloat16, D)
TYPES(64)
TYPES(80)
TYPES(96)
TYPES(128)
TYPES(192)
TYPES(256)

// Kernels over dense keys and values in f16 or bf16, in blocks of a block table: append, attention,
// sums of attention probabilities per entry, moves of entries, and the eviction of one. D is 64, 80,
// 96, 128, 192 or 256.
#include "paged/append.cuh"
#include "paged/attend.cuh"
#include "paged/evict.cuh"
#include "paged/sums.cuh"

extern "C" __global__ void __launch_bounds__(APPEND_THREADS) paged_append(const AppendArgs a) { append(a); }
extern "C" __global__ void __launch_bounds__(MOVE_THREADS) paged_move(const MoveArgs a) { move(a); }
extern "C" __global__ void __launch_bounds__(EVICT_THREADS) paged_evict(const __grid_constant__ EvictLayers a) { evict(a.layers[blockIdx.y]); }

#define ATTEND(NAME, PAIR, D, N)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(Rings<D>::THREADS) paged_attend_##NAME##_d##D##_n##N(const AttendArgs a) { \
        attend<PAIR, D, N>(a);                                                                                                     \
    }
#define SUMS(NAME, PAIR, D) \
    extern "C" __global__ void __launch_bounds__(SUMS_THREADS) paged_sums_##NAME##_d##D(const SumsArgs a) { sums<PAIR, D>(a); }
#define KERNELS(NAME, PAIR, D) ATTEND(NAME, PAIR, D, 1) ATTEND(NAME, PAIR, D, 2) SUMS(NAME, PAIR, D)
#define FORMATS(D) KERNELS(f16, __half2, D) KERNELS(bf16, __nv_bfloat162, D)
FORMATS(64)
FORMATS(80)
FORMATS(96)
FORMATS(128)
FORMATS(192)
FORMATS(256)

// Defines the kernels quantize_b<bits>_g<group>_d<head_dim>, unpack_... with the same suffix,
// fill_rings and keep_ring.
#include "fill.cuh"
#include "quantize.cuh"
#include "unpack.cuh"

extern "C" __global__ void fill_rings(const kvq::FillArgs args) { kvq::fill_rings(args); }
extern "C" __global__ void __launch_bounds__(kvq::KEEP_THREADS) keep_ring(const kvq::CompactRow* rows) { kvq::keep_ring(rows); }

#define KERNELS(B, G, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) quantize_b##B##_g##G##_d##D(const kvq::FillArgs args) { \
        kvq::Quantize<B, G, D>::run(args);                                                                       \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) unpack_b##B##_g##G##_d##D(const kvq::UnpackArgs args) { kvq::unpack<kvq::Kivi<B, G, D>>(args); }
#define GROUPS(B, D) KERNELS(B, 32, D) KERNELS(B, 64, D) KERNELS(B, 128, D)
#define HEAD_DIMS(B) GROUPS(B, 64) GROUPS(B, 128) GROUPS(B, 256)
HEAD_DIMS(2)
HEAD_DIMS(3)
HEAD_DIMS(4)
HEAD_DIMS(8)

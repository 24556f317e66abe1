// Defines the kernels quantize_kivi<bits of keys><bits of values>_g<group>_d<head_dim>, unpack_...
// with the same suffix, fill_rings and keep_ring.
#include "fill.cuh"
#include "quantize.cuh"
#include "unpack.cuh"

extern "C" __global__ void fill_rings(const kvq::FillArgs args) { kvq::fill_rings(args); }
extern "C" __global__ void __launch_bounds__(kvq::KEEP_THREADS) keep_ring(const kvq::CompactRow* rows) { kvq::keep_ring(rows); }

#define KERNELS(K, V, G, D)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) quantize_kivi##K##V##_g##G##_d##D(const kvq::FillArgs args) {   \
        kvq::Quantize<K, V, G, D>::run(args);                                                                            \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) unpack_kivi##K##V##_g##G##_d##D(const kvq::UnpackArgs args) {   \
        kvq::unpack<kvq::Kivi<K, V, G, D>>(args);                                                                        \
    }
#define GROUPS(K, V, D) KERNELS(K, V, 32, D) KERNELS(K, V, 64, D) KERNELS(K, V, 128, D)
#define HEAD_DIMS(K, V) GROUPS(K, V, 64) GROUPS(K, V, 128) GROUPS(K, V, 256)
HEAD_DIMS(2, 2)
HEAD_DIMS(3, 3)
HEAD_DIMS(4, 4)
HEAD_DIMS(8, 8)
HEAD_DIMS(4, 2)
HEAD_DIMS(2, 4)

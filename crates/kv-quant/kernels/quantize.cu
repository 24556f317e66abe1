// quantize_b<bits>_g<group>_d<head_dim>
#include "quantize.cuh"

#define KERNEL(B, G, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) quantize_b##B##_g##G##_d##D(const kvq::QuantizeArgs args) { \
        kvq::Quantize<B, G, D>::run(args);                                                                       \
    }
#define GROUPS(B, D) KERNEL(B, 32, D) KERNEL(B, 64, D) KERNEL(B, 128, D)
#define HEAD_DIMS(B) GROUPS(B, 64) GROUPS(B, 128) GROUPS(B, 256)
HEAD_DIMS(2)
HEAD_DIMS(4)
HEAD_DIMS(8)

// attend_b<bits>_g<group>_d<head_dim>_n<blocks of 8 columns>, for every shape but the bits. src/cuda/kernels.rs knows the warps and stages.
#pragma once
#include "attend.cuh"

#define ATTEND(B, G, D, N, WARPS, STAGES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_b##B##_g##G##_d##D##_n##N(const kvq::AttendArgs args) { \
        kvq::attend<B, G, D, N, WARPS, STAGES>(args);                                                                     \
    }
#define ATTEND_GROUPS(B, D, N, WARPS, STAGES) \
    ATTEND(B, 32, D, N, WARPS, STAGES) ATTEND(B, 64, D, N, WARPS, STAGES) ATTEND(B, 128, D, N, WARPS, STAGES)

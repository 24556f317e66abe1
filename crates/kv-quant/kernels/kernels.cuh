// attend_b<bits>_g<group>_d<head_dim>_n<blocks of 8 columns> and mass_b<bits>_g<group>_d<head_dim>, for every shape but the bits.
// src/cuda/kernels.rs knows the warps and stages.
#pragma once
#include "attend.cuh"
#include "mass.cuh"

#define ATTEND(B, G, D, N, WARPS, STAGES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_b##B##_g##G##_d##D##_n##N(const kvq::AttendArgs args) { \
        kvq::attend<B, G, D, N, WARPS, STAGES>(args);                                                                     \
    }
#define ATTEND_GROUPS(B, D, N, WARPS, STAGES) \
    ATTEND(B, 32, D, N, WARPS, STAGES) ATTEND(B, 64, D, N, WARPS, STAGES) ATTEND(B, 128, D, N, WARPS, STAGES)

#define MASS(B, G, D)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(kvq::MASS_WARPS * 32) mass_b##B##_g##G##_d##D(const kvq::AttendArgs args) { \
        kvq::mass<B, G, D>(args);                                                                                              \
    }
#define MASS_GROUPS(B, D) MASS(B, 32, D) MASS(B, 64, D) MASS(B, 128, D)
#define MASSES(B) MASS_GROUPS(B, 64) MASS_GROUPS(B, 128) MASS_GROUPS(B, 256)

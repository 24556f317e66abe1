// Defines the kernels attend_b<bits>_g<group>_d<head_dim>_n<blocks of 8 columns> and
// sums_b<bits>_g<group>_d<head_dim> for all shapes at the given bits. src/cuda/kernels.rs has their
// warps and stages.
#pragma once
#include "attend.cuh"
#include "sums.cuh"

#define ATTEND(B, G, D, N, WARPS, STAGES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_b##B##_g##G##_d##D##_n##N(const kvq::AttendArgs args) { \
        kvq::attend<kvq::Kivi<B, G, D>, N, WARPS, STAGES>(args);                                                                     \
    }
#define ATTEND_GROUPS(B, D, N, WARPS, STAGES) \
    ATTEND(B, 32, D, N, WARPS, STAGES) ATTEND(B, 64, D, N, WARPS, STAGES) ATTEND(B, 128, D, N, WARPS, STAGES)

#define SUM(B, G, D)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(kvq::SUM_WARPS * 32) sums_b##B##_g##G##_d##D(const kvq::AttendArgs args) { \
        kvq::sums<kvq::Kivi<B, G, D>>(args);                                                                                              \
    }
#define SUMS_GROUPS(B, D) SUM(B, 32, D) SUM(B, 64, D) SUM(B, 128, D)
#define SUMS(B) SUMS_GROUPS(B, 64) SUMS_GROUPS(B, 128) SUMS_GROUPS(B, 256)

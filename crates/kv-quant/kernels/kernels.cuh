// Defines the kernels attend_kivi<bits of keys><bits of values>_g<group>_d<head_dim>_n<blocks of 8
// columns> and sums_kivi<bits of keys><bits of values>_g<group>_d<head_dim> for all shapes at the
// given bits. src/cuda/layout.rs has their warps and stages. With 128 registers per thread, four
// blocks of 4 warps fit a multiprocessor.
#pragma once
#include "attend.cuh"
#include "sums.cuh"

#define ATTEND(K, V, G, D, N, WARPS, STAGES)                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, D == 128 && N == 1 && K < 8 ? 4 : 1) attend_kivi##K##V##_g##G##_d##D##_n##N(const kvq::AttendArgs args) { \
        kvq::attend<kvq::Kivi<K, V, G, D>, N, WARPS, STAGES>(args);                                                               \
    }
#define ATTEND_GROUPS(K, V, D, N, WARPS, STAGES) \
    ATTEND(K, V, 32, D, N, WARPS, STAGES) ATTEND(K, V, 64, D, N, WARPS, STAGES) ATTEND(K, V, 128, D, N, WARPS, STAGES)

#define SUM(K, V, G, D)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(kvq::SUM_WARPS * 32) sums_kivi##K##V##_g##G##_d##D(const kvq::AttendArgs args) { \
        kvq::sums<kvq::Kivi<K, V, G, D>>(args);                                                                                   \
    }
#define SUMS_GROUPS(K, V, D) SUM(K, V, 32, D) SUM(K, V, 64, D) SUM(K, V, 128, D)
#define SUMS(K, V) SUMS_GROUPS(K, V, 64) SUMS_GROUPS(K, V, 128) SUMS_GROUPS(K, V, 256)

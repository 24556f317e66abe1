// Defines the kernels attend_kivi<bits of keys><bits of values>_g<group>_d<head_dim>_n<blocks of 8
// columns> and sums_kivi<bits of keys><bits of values>_g<group>_d<head_dim> for all shapes at the
// given bits, and attend_…_few for few heads. src/cuda/layout.rs has their warps and stages. With 128
// registers per thread, four blocks of 4 warps fit a multiprocessor.
#pragma once
#include "attend.cuh"
#include "sums.cuh"

#define ATTEND_AS(NAME, K, V, G, D, N, WARPS, STAGES) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, D == 128 && N == 1 && K < 8 ? 16 / WARPS : 1) NAME(const kvq::AttendArgs args) { \
        kvq::attend<kvq::Kivi<K, V, G, D>, N, WARPS, STAGES>(args); \
    }
#define ATTEND(K, V, G, D, N, WARPS, STAGES) ATTEND_AS(attend_kivi##K##V##_g##G##_d##D##_n##N, K, V, G, D, N, WARPS, STAGES)
#define FEW(K, V, G, D, WARPS, STAGES) ATTEND_AS(attend_kivi##K##V##_g##G##_d##D##_few, K, V, G, D, 1, WARPS, STAGES)
#define ATTEND_GROUPS(K, V, D, N, WARPS, STAGES) \
    ATTEND(K, V, 32, D, N, WARPS, STAGES) ATTEND(K, V, 64, D, N, WARPS, STAGES) ATTEND(K, V, 128, D, N, WARPS, STAGES)

#define ATTEND_FEW(K, V, D, WARPS, STAGES) FEW(K, V, 32, D, WARPS, STAGES) FEW(K, V, 64, D, WARPS, STAGES) FEW(K, V, 128, D, WARPS, STAGES)

#define SUM(K, V, G, D)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(kvq::SUM_WARPS * 32) sums_kivi##K##V##_g##G##_d##D(const kvq::AttendArgs args) { \
        kvq::sums<kvq::Kivi<K, V, G, D>>(args);                                                                                   \
    }
#define SUMS_GROUPS(K, V, D) SUM(K, V, 32, D) SUM(K, V, 64, D) SUM(K, V, 128, D)
#define SUMS(K, V) SUMS_GROUPS(K, V, 64) SUMS_GROUPS(K, V, 128) SUMS_GROUPS(K, V, 256)

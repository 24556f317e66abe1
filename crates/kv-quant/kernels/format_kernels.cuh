// Defines the kernels attend_<format>_d<head_dim>, for blocks of 8 columns, and sums_...,
// quantize_... and unpack_... with the same suffix. src/cuda/kernels.rs has their warps, stages and
// sizes.
#pragma once
#include "attend.cuh"
#include "balance.cuh"
#include "formats.cuh"
#include "sums.cuh"
#include "unpack.cuh"

#define TOKEN_BOUNDS(L) __launch_bounds__(kvq::TOKEN_THREADS, kvq::token_blocks<L>())
#define BALANCE_BOUNDS(L) __launch_bounds__(kvq::balance_threads<L>())

#define KERNELS(NAME, LAYOUT, D, BOUNDS, QUANTIZE)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * kvq::attend_warps<kvq::LAYOUT<D>>()) attend_##NAME##_d##D(const kvq::AttendArgs args) {                \
        kvq::attend<kvq::LAYOUT<D>, 1, kvq::attend_warps<kvq::LAYOUT<D>>(), kvq::attend_stages<kvq::LAYOUT<D>>()>(args);                                          \
    }                                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kvq::SUM_WARPS * 32) sums_##NAME##_d##D(const kvq::AttendArgs args) { kvq::sums<kvq::LAYOUT<D>>(args); }    \
    extern "C" __global__ void BOUNDS(kvq::LAYOUT<D>) quantize_##NAME##_d##D(const kvq::FillArgs args) {                                      \
        QUANTIZE<kvq::LAYOUT<D>>(args);                                                                                                                     \
    }                                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kvq::UNPACK_THREADS) unpack_##NAME##_d##D(const kvq::UnpackArgs args) { kvq::unpack<kvq::LAYOUT<D>>(args); }

#define HEAD_DIMS(NAME, LAYOUT, BOUNDS, QUANTIZE) \
    KERNELS(NAME, LAYOUT, 64, BOUNDS, QUANTIZE) KERNELS(NAME, LAYOUT, 128, BOUNDS, QUANTIZE) KERNELS(NAME, LAYOUT, 256, BOUNDS, QUANTIZE)

// Formats with parameters per token, and KVarN's formats.
#define TOKENS(NAME, LAYOUT) HEAD_DIMS(NAME, LAYOUT, TOKEN_BOUNDS, kvq::quantize_tokens)
#define BALANCED(NAME, LAYOUT) HEAD_DIMS(NAME, LAYOUT, BALANCE_BOUNDS, kvq::quantize_balanced)

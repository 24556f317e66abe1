// Numbers in memory, and functions of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hybrid {

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float number(const __half* p, long long i) { return __half2float(p[i]); }
__device__ __forceinline__ float number(const __nv_bfloat16* p, long long i) { return __bfloat162float(p[i]); }
__device__ __forceinline__ void put(__half* p, long long i, float x) { p[i] = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* p, long long i, float x) { p[i] = __float2bfloat16_rn(x); }

// 2^x to 2 units in the last place.
__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Beyond 20, softplus is its argument in f32.
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(exp2_of(x * LOG2_E)); }

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + exp2_of(-x * LOG2_E)); }

}  // namespace hybrid

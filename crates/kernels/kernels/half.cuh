// Conversions between half precision and f32, and the activation of gated feed-forward blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ void narrow(__half& y, float x) { y = __float2half_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(__half2& y, float2 x) { y = __float22half2_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat162& y, float2 x) { y = __float22bfloat162_rn(x); }

template <class Pair>
__device__ __forceinline__ void widen(float (&y)[8], const uint4& x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = widen(reinterpret_cast<const Pair*>(&x)[i]);
        y[2 * i] = two.x, y[2 * i + 1] = two.y;
    }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

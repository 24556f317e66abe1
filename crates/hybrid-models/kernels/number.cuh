// Conversions of elements, and functions of f32.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hybrid {

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half rounded<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two adjacent elements as stored in memory, the first in the lower half.
template <class T>
struct PairOf {
    typedef uint32_t Bits;
};
template <>
struct PairOf<float> {
    typedef float2 Bits;
};
template <class T>
using Bits = typename PairOf<T>::Bits;
template <class T>
__device__ __forceinline__ Bits<T> packed(float x, float y);
template <>
__device__ __forceinline__ float2 packed<float>(float x, float y) { return make_float2(x, y); }
template <>
__device__ __forceinline__ uint32_t packed<__half>(float x, float y) {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t packed<__nv_bfloat16>(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
}
template <class T>
__device__ __forceinline__ float2 unpacked(Bits<T> x);
template <>
__device__ __forceinline__ float2 unpacked<float>(float2 x) { return x; }
template <>
__device__ __forceinline__ float2 unpacked<__half>(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
template <>
__device__ __forceinline__ float2 unpacked<__nv_bfloat16>(uint32_t x) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x)); }

// Loads two elements. PAIRED: they are adjacent and are loaded in one access. Otherwise they may
// be anywhere, and may be the same one.
template <bool PAIRED, class T>
__device__ __forceinline__ Bits<T> pair_of(const T* first, const T* second) {
    if (PAIRED) return *reinterpret_cast<const Bits<T>*>(first);
    return packed<T>(number(*first), number(*second));
}

// Returns 2^x, with an error of up to 2 units in the last place.
__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float exp_of(float x) { return exp2_of(x * LOG2_E); }

__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// For x > 20, softplus(x) is x in f32. For x < -8, 1 + e^x would lose digits, so two terms of the
// logarithm's series are used.
__device__ __forceinline__ float softplus(float x) {
    const float e = exp_of(x);
    const float y = x < -8.f ? e * fmaf(e, -0.5f, 1.f) : 0.6931471805599453f * __log2f(1.f + e);
    return x > 20.f ? x : y;
}

__device__ __forceinline__ float sigmoid(float x) { return inverse(1.f + exp_of(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// GELU with tanh: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
__device__ __forceinline__ float gelu(float x) { return x * sigmoid(1.5957691216057308f * fmaf(0.044715f * x * x, x, x)); }

// The decays of RWKV-6, e^-e^x, and of RWKV-7, e^(-e^(-1/2) sigmoid(x)).
__device__ __forceinline__ float forget6(float x) { return exp_of(-exp_of(x)); }
__device__ __forceinline__ float forget7(float x) { return exp2_of(-0.6065306597126334f * LOG2_E * sigmoid(x)); }

// Returns tanh with an error of up to 2^-11.
__device__ __forceinline__ float tanh_of(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Products of pairs of f16 in a word.
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ uint32_t times_plus(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}

// Sums x[0..N) over N lanes, APART from each other. Lane i of them gets the sum of x[i].
template <int N, int APART = 1, int M>
__device__ __forceinline__ float sums_of_lanes(float (&x)[M], int lane) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        constexpr int HALF = N / 2;
        const bool upper = lane / APART & HALF;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float kept = upper ? x[i + HALF] : x[i], given = upper ? x[i] : x[i + HALF];
            x[i] = kept + __shfl_xor_sync(~0u, given, HALF * APART);
        }
        return sums_of_lanes<HALF, APART>(x, lane);
    }
}

// Defines the entry points NAME_f16, NAME_bf16 and NAME_f32 of `kernel<T>(Args)`. bounds: (threads)
// or (threads, blocks).
#define ENTRY(name, bounds, kernel, Args, kind, T) \
    extern "C" __global__ void __launch_bounds__ bounds name##_##kind(Args p) { kernel<T>(p); }
#define ENTRIES(name, bounds, kernel, Args)                \
    ENTRY(name, bounds, kernel, Args, f16, __half)         \
    ENTRY(name, bounds, kernel, Args, bf16, __nv_bfloat16) \
    ENTRY(name, bounds, kernel, Args, f32, float)

}  // namespace hybrid

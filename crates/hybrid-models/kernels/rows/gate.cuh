// Elementwise operations on rows: products with functions of a gate, blends, biases.
#pragma once
#include "../args.cuh"
#include "row_vectors.cuh"

namespace hybrid {

constexpr int GATE_THREADS = 256;

__device__ __forceinline__ float opened(int function, float x) {
    switch (function) {
        case GATE_SILU: return silu(x);
        case GATE_GELU: return gelu(x);
        case GATE_SIGMOID: return sigmoid(x);
        default: return fmaxf(x, 0.f);
    }
}

template <class T, bool WHOLE>
__device__ void gate_of(const Gate& p) {
    const auto [row, c, count] = row_part(p.channels);
    if (row >= p.rows) return;
    float gate[VECTOR], x[VECTOR], gate_bias[VECTOR] = {}, x_bias[VECTOR] = {};
    load<WHOLE>((const T*)p.gate + row * p.gate_row + c, count, gate), load<WHOLE>((const T*)p.x + row * p.x_row + c, count, x);
    if (p.x_bias) load<WHOLE>(p.gate_bias + c, count, gate_bias), load<WHOLE>(p.x_bias + c, count, x_bias);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = opened(p.function, gate[i] + gate_bias[i]) * (x[i] + x_bias[i]);
    store<WHOLE>((T*)p.y + row * p.channels + c, count, x);
}

template <class T>
__device__ void gate(const Gate& p) {
    if (all_vectorizable(p.gate, p.x, p.gate_bias, p.x_bias, p.y, p.channels, p.gate_row, p.x_row)) gate_of<T, true>(p);
    else gate_of<T, false>(p);
}

template <class T, bool WHOLE>
__device__ void blend_of(const Blend& p) {
    const auto [row, c, count] = row_part(p.channels);
    if (row >= p.rows) return;
    const long long at = row * p.channels + c;
    float x[VECTOR], other[VECTOR], share[VECTOR], bias[VECTOR];
    load<WHOLE>((const T*)p.x + at, count, x), load<WHOLE>((const T*)p.other + at, count, other);
    load<WHOLE>((const T*)p.share + at, count, share), load<WHOLE>(p.bias + c, count, bias);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = fmaf(other[i] - x[i], sigmoid(share[i] + bias[i]), x[i]);
    store<WHOLE>((T*)p.y + at, count, x);
}

template <class T>
__device__ void blend(const Blend& p) {
    if (all_vectorizable(p.x, p.other, p.share, p.bias, p.y, p.channels)) blend_of<T, true>(p);
    else blend_of<T, false>(p);
}

template <class T, bool WHOLE>
__device__ void bias_of(const Bias& p) {
    const auto [row, c, count] = row_part(p.channels);
    if (row >= p.rows) return;
    T* y = (T*)p.y + row * p.channels + c;
    float x[VECTOR], bias[VECTOR];
    load<WHOLE>(y, count, x), load<WHOLE>(p.bias + c, count, bias);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] += bias[i];
    store<WHOLE>(y, count, x);
}

template <class T>
__device__ void bias(const Bias& p) {
    if (all_vectorizable(p.y, p.bias, p.channels)) bias_of<T, true>(p);
    else bias_of<T, false>(p);
}

}  // namespace hybrid

// The recurrences of RWKV-5 and 6 (Peng and others, arXiv 2404.05892) and of RWKV-7 (arXiv
// 2503.14456), any shape, token by token.
#pragma once
#include "../columns.cuh"

namespace hybrid {

template <class T, int N, bool TOKEN_DECAYS>
__device__ void wkv_columns(const Wkv& p) {
    const Place place;
    const int first = blockIdx.y * p.dim, at = first + place.column;
    Column<N> s(p.state, (long long)blockIdx.z * p.heads + blockIdx.y, p.dim, p.dim, place);
    for (int t = 0; t < p.tokens; t++) {
        const long long row = (long long)blockIdx.z * p.tokens + t;
        const T *r = (const T*)p.r + row * p.r_row + first, *k = (const T*)p.k + row * p.k_row + first;
        const float v = s.used ? number(((const T*)p.v)[row * p.v_row + at]) : 0.f;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (!s.has(i)) continue;
            const int key = s.row(i);
            float w = p.decay[first + key];
            if (TOKEN_DECAYS) w = forget6(w + number(((const T*)p.w)[row * p.w_row + first + key]));
            const float kv = number(k[key]) * v;
            sum = fmaf(number(r[key]), fmaf(p.u[first + key], kv, s.s[i]), sum);
            s.s[i] = fmaf(w, s.s[i], kv);
        }
        sum = sum_of_parts(sum);
        if (s.used && s.part == 0) ((T*)p.y)[row * p.y_row + at] = rounded<T>(sum);
    }
    s.store();
}

template <class T, int N>
__device__ void wkv7_columns(const Wkv7& p) {
    const Place place;
    const int first = blockIdx.y * p.dim, at = first + place.column;
    Column<N> s(p.state, (long long)blockIdx.z * p.heads + blockIdx.y, p.dim, p.dim, place);
    for (int t = 0; t < p.tokens; t++) {
        const long long row = (long long)blockIdx.z * p.tokens + t;
        auto of = [&](const void* x, int stride, int key) { return number(((const T*)x)[row * stride + first + key]); };
        const float v = s.used ? of(p.v, p.v_row, place.column) : 0.f;
        // All threads take part in the sums, including those of columns beyond the last.
        float norm = 0, found = 0, bonus = 0, sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int key = s.row(i);
            if (key >= p.dim) continue;
            const float removal = of(p.key, p.key_row, key) * p.removal_scale[first + key];
            norm = fmaf(removal, removal, norm);
            found = fmaf(removal, s.s[i], found);
        }
        const float scale = 1.f / fmaxf(sqrtf(sum_of_parts(norm)), 1e-12f);
        found = -sum_of_parts(found) * scale;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int key = s.row(i);
            if (key >= p.dim) continue;
            const float key_of = of(p.key, p.key_row, key), rate = sigmoid(of(p.a, p.a_row, key) + p.rate_bias[first + key]);
            const float added = rate * key_of * p.removal_scale[first + key] * scale;
            const float k = key_of * fmaf(rate - 1.f, p.key_rate[first + key], 1.f);
            const float w = forget7(of(p.w, p.w_row, key) + p.decay[first + key]), r = of(p.r, p.r_row, key);
            s.s[i] = fmaf(w, s.s[i], fmaf(added, found, k * v));
            sum = fmaf(r, s.s[i], sum);
            bonus = fmaf(r * k, p.bonus_weight[first + key], bonus);
        }
        sum = sum_of_parts(sum), bonus = sum_of_parts(bonus);
        if (s.used && s.part == 0) ((T*)p.y)[row * p.y_row + at] = rounded<T>(sum);
        if (p.bonus && place.column == 0 && s.part == 0) p.bonus[row * p.heads + blockIdx.y] = bonus;
    }
    s.store();
}

template <class T>
__device__ void wkv5_generic(const Wkv& p) { p.dim <= 16 * PARTS ? wkv_columns<T, 16, false>(p) : wkv_columns<T, 32, false>(p); }
template <class T>
__device__ void wkv6_generic(const Wkv& p) { p.dim <= 16 * PARTS ? wkv_columns<T, 16, true>(p) : wkv_columns<T, 32, true>(p); }
template <class T>
__device__ void wkv7_generic(const Wkv7& p) { p.dim <= 16 * PARTS ? wkv7_columns<T, 16>(p) : wkv7_columns<T, 32>(p); }

}  // namespace hybrid

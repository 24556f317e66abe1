// Mamba-2's recurrence (Dao and Gu, arXiv 2405.21060), any shape, token by token.
#pragma once
#include "../columns.cuh"

namespace hybrid {

template <class T, int N>
__device__ void ssd_columns(const Ssd& p) {
    const Place place;
    const int head = blockIdx.y, group = head / (p.heads / p.groups);
    Column<N> h(p.state, (long long)blockIdx.z * p.heads + head, p.states, p.head_dim, place);
    const float a = p.a[head] * LOG2_E, d = p.d[head], bias = p.bias[head];
    for (int t = 0; t < p.tokens; t++) {
        const long long row = (long long)blockIdx.z * p.tokens + t;
        const T *b = (const T*)p.b + row * p.b_row + group * p.states, *c = (const T*)p.c + row * p.c_row + group * p.states;
        const float dt = fminf(fmaxf(softplus(number(((const T*)p.steps)[row * p.steps_row + head]) + bias), p.step_min), p.step_max);
        const int at = head * p.head_dim + place.column;
        const float x = h.used ? number(((const T*)p.x)[row * p.x_row + at]) : 0.f;
        const float decay = exp2_of(dt * a), in = dt * x;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (!h.has(i)) continue;
            h.s[i] = fmaf(decay, h.s[i], in * number(b[h.row(i)]));
            sum = fmaf(h.s[i], number(c[h.row(i)]), sum);
        }
        sum = sum_of_parts(sum);
        if (h.used && h.part == 0) ((T*)p.y)[row * p.y_row + at] = rounded<T>(fmaf(d, x, sum));
    }
    h.store();
}

template <class T>
__device__ void ssd_generic(const Ssd& p) {
    if (p.states <= 16 * PARTS) ssd_columns<T, 16>(p);
    else if (p.states <= 32 * PARTS) ssd_columns<T, 32>(p);
    else ssd_columns<T, 64>(p);
}

}  // namespace hybrid

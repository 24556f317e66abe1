// RWKV's token shift: mixes of each row with the previous row.
//
// A thread has eight channels of SHIFT_RUN rows, which stay in registers for all mixes.
#pragma once
#include "../args.cuh"
#include "row_vectors.cuh"

namespace hybrid {

constexpr int SHIFT_THREADS = 128, SHIFT_CHANNELS = SHIFT_THREADS * VECTOR, SHIFT_RUN = 4;

template <class T, bool WHOLE>
__device__ void shift_of(const Shift& p) {
    const int c = blockIdx.x * SHIFT_CHANNELS + threadIdx.x * VECTOR, start = blockIdx.y * SHIFT_RUN, entry = blockIdx.z;
    if (c >= p.channels) return;
    const int count = min(VECTOR, p.channels - c), end = min(SHIFT_RUN, p.tokens - start);
    const long long at = ((long long)entry * p.tokens + start) * p.channels + c, state = (long long)entry * p.channels + c;
    const float* x = p.x + at;
    // rows[0] is the row before the run.
    float rows[SHIFT_RUN + 1][VECTOR];
    load<WHOLE>(start > 0 ? x - p.channels : p.before + state, count, rows[0]);
#pragma unroll
    for (int r = 0; r < SHIFT_RUN; r++) {
        if (r < end) load<WHOLE>(x + (long long)r * p.channels, count, rows[r + 1]);
    }
#pragma unroll
    for (int r = 0; r < SHIFT_RUN; r++) {
        if (p.last && start + r == p.tokens - 1) store<WHOLE>(p.last + state, count, rows[r + 1]);
    }
    const long long of_mix = (long long)gridDim.z * p.tokens * p.channels;
    for (int mix = 0; mix < p.mixes; mix++) {
        float weight[VECTOR];
        load<WHOLE>(p.weights + (long long)mix * p.channels + c, count, weight);
#pragma unroll
        for (int r = 0; r < SHIFT_RUN; r++) {
            if (r >= end) break;
            const long long to = mix * of_mix + at + (long long)r * p.channels;
            float more[VECTOR] = {}, y[VECTOR];
            if (p.more) load<WHOLE>((const T*)p.more + to, count, more);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) y[i] = fmaf(rows[r][i] - rows[r + 1][i], weight[i] + more[i], rows[r + 1][i]);
            store<WHOLE>((T*)p.y + to, count, y);
        }
    }
}

template <class T>
__device__ void shift(const Shift& p) {
    if (all_vectorizable(p.x, p.before, p.last, p.weights, p.more, p.y, p.channels)) shift_of<T, true>(p);
    else shift_of<T, false>(p);
}

}  // namespace hybrid

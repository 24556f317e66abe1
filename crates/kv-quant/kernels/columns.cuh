// The small operand of the tensor cores: a block's columns (query heads of one kv head times
// queries), and their visible ranges.
#pragma once
#include "args.cuh"
#include "hadamard.cuh"
#include "layout.cuh"

namespace kvq {

// The constants of this lane's two columns: the softmax scale in base 2, and the visible range of
// entries.
template <int N>
struct Columns {
    float scale[N][2];
    int from[N][2], to[N][2];
    int from_max, to_min;  // the range over all columns of the block
    float soft_cap;
};

// Stores the block's `columns` columns from `first` on as fragments in shared memory. Each is
// scaled by a power of two such that its largest element is in [0.5, 1), so that products with
// scales of keys stay in f16's range. `factors` receives these powers. Queries of rotated keys are
// rotated.
template <int D, int N>
__device__ __forceinline__ void load_queries(const AttendArgs& args, const Work& work, int first, int columns, bool rotated, unsigned char* queries, float* factors) {
    for (int column = threadIdx.x / 32; column < 8 * N; column += blockDim.x / 32) {
        const int lane = threadIdx.x % 32;
        const long long row = column < columns ? row_of(args, work, first + column) : 0;
        float x[D / 32], top = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            x[i] = column < columns ? load_as_float(args.q, row * D + i * 32 + lane, args.kind) : 0.f;
        }
        if (rotated) hadamard<D>(x, lane);
#pragma unroll
        for (int i = 0; i < D / 32; i++) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
        for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, i));
        int exponent = 0;
        if (top > 0.f) frexpf(top, &exponent);
        float shrink = ldexpf(1.f, -exponent);
        if (lane == 0) factors[column] = ldexpf(1.f, exponent);
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            int k = lane % 16;
            int at = ((column / 8 * (D / 32) + i) * 32 + column % 8 * 4 + k % 8 / 2) * 8 + lane / 16 * 4 + k / 8 * 2 + k % 2;
            reinterpret_cast<__half*>(queries)[at] = __float2half(x[i] * shrink);
        }
    }
}

// Computes the constants of the block's columns. Column c is query (first + c) % queries. `factors`
// is the output of `load_queries`.
template <int N>
__device__ __forceinline__ Columns<N> columns_of(const AttendArgs& args, const float* factors, int queries, int first, int entries, int lane) {
    Columns<N> columns;
    columns.soft_cap = args.soft_cap, columns.from_max = 0, columns.to_min = entries;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int column = 8 * n + lane % 4 * 2 + e;
            columns.scale[n][e] = factors[column] * args.scale * LOG2E;
            int to = entries, from = 0;
            if (args.causal) {
                to += 1 - queries + (first + column) % queries;
                if (args.window) from = max(0, to - args.window);
            }
            columns.from[n][e] = from, columns.to[n][e] = to;
        }
    if (args.causal) {
        columns.to_min = entries + 1 - queries;
        if (args.window) columns.from_max = max(0, entries - args.window);
    }
    return columns;
}

// Applies the soft cap and the mask to the scores of 32 slots from `at` on. Slots from `end` on are
// masked.
template <int N>
__device__ __forceinline__ void restrict(float (&s)[2][N][4], const Columns<N>& columns, const HeadWork& work, int at, int end, int lane) {
    // The ring's first slot may not be a multiple of 32.
    const bool aligned = at % TILE == 0;
    uint2 valid = aligned ? valid_at(work, at) : make_uint2(at < work.valid_slots ? 0 : FULL, at - work.holes);
    if (columns.soft_cap > 0.f) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float natural = columns.scale[n][e] / LOG2E;
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int h = 0; h < 4; h += 2)
                        s[r][n][e + h] = columns.soft_cap * tanhf(s[r][n][e + h] * natural / columns.soft_cap) / natural;
            }
    }
    if (valid.x == FULL && int(valid.y) >= columns.from_max && int(valid.y) + TILE <= columns.to_min && at + TILE <= end) return;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = 16 * r + 8 * h + lane / 4, slot = at + i;
            int entry = aligned ? entry_in(valid, i) : entry_in(valid_at(work, slot & ~(TILE - 1)), slot % TILE);
            if (slot >= end) entry = -1;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (entry < columns.from[n][e] || entry >= columns.to[n][e]) s[r][n][2 * h + e] = -INFINITY;
        }
}

}  // namespace kvq

// Online softmax over accumulator fragments, and storing of a tile's results.
//
// A thread holds two rows of its warp's 16 x N accumulator, 8 apart: x[4 j + 2 h + e] is column 8 j
// + 2 (lane % 4) + e of row lane / 4 + 8 h. mma.m16n8k16 and wgmma share this layout. Four
// neighbouring lanes share a row.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>
#include "tile.cuh"

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// tanh with an error of about 1e-7. tanh.approx has an error of 2^-11, which a soft cap of 50 turns
// into 0.02 of a score.
__device__ __forceinline__ float tanh_exp(float x) { return 1.f - 2.f * reciprocal(1.f + exp2_approx(2.f * LOG2E * x)); }

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
    if constexpr (std::is_same<T, __half>::value) {
        const __half2 pair = __floats2half2_rn(x, y);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

// A thread's two rows of a tile.
struct Rows {
    int token[2], head[2];   // In the tile
    int start[2], limit[2];  // Visible keys: start..limit
    bool valid[2];

    __device__ __forceinline__ Rows(const Tile& tile, int pack, int first_row, int tile_rows) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * h;
            token[h] = row / pack, head[h] = row % pack;
            start[h] = tile.start(token[h]), limit[h] = tile.limit(token[h]);
            valid[h] = row < tile_rows && token[h] < tile.tokens;
        }
    }
};

struct Softmax {
    float max[2], sum[2];  // max before scaling; sum of this thread's columns only
    float scale;           // From scores to base-2 logarithms
    float cap_scale;       // 0: no soft cap

    Softmax() = default;
    __device__ __forceinline__ Softmax(const PrefillArgs& a) {
        const bool capped = a.soft_cap > 0.f;
        scale = (capped ? a.soft_cap : a.scale) * LOG2E, cap_scale = capped ? a.scale / a.soft_cap : 0.f;
        max[0] = max[1] = -INFINITY, sum[0] = sum[1] = 0.f;
    }

    template <int L>
    __device__ __forceinline__ void cap(float (&s)[L]) const {
        if (cap_scale == 0.f) return;
#pragma unroll
        for (int i = 0; i < L; i++) s[i] = tanh_exp(s[i] * cap_scale);
    }
    // first_key is the key of column 0.
    template <int L>
    __device__ __forceinline__ static void mask(float (&s)[L], const Rows& rows, int first_key) {
        const int key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int limit = rows.limit[h] - key, start = rows.start[h] - key;
#pragma unroll
            for (int j = 0; j < L / 4; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * j + e;
                    if (column >= limit || column < start) s[4 * j + 2 * h + e] = -INFINITY;
                }
            }
        }
    }

    // Turns scores into probabilities relative to the new maxima. `factor` is what earlier sums and
    // outputs are multiplied by.
    template <int L>
    __device__ __forceinline__ void update(float (&s)[L], float (&factor)[2]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = max[h];
#pragma unroll
            for (int j = 0; j < L / 4; j++) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float finite = top == -INFINITY ? 0.f : top, shift = finite * scale;
            factor[h] = exp2_approx(max[h] * scale - shift);
            max[h] = top;
            float part = 0.f;
#pragma unroll
            for (int j = 0; j < L / 4; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[4 * j + 2 * h + e];
                    x = exp2_approx(fmaf(x, scale, -shift));
                    part += x;
                }
            }
            sum[h] = fmaf(sum[h], factor[h], part);
        }
    }

    // Adds the sums of a row's four lanes. inverse() and lse() are valid after it.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        }
    }
    __device__ __forceinline__ float inverse(int h) const { return sum[h] > 0.f ? 1.f / sum[h] : 0.f; }
    __device__ __forceinline__ float lse(int h) const { return sum[h] > 0.f ? (max[h] * scale + log2f(sum[h])) / LOG2E : -INFINITY; }
};

template <int L>
__device__ __forceinline__ void rescale(float (&o)[L], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < L / 4; j++) {
        o[4 * j] *= factor[0], o[4 * j + 1] *= factor[0];
        o[4 * j + 2] *= factor[1], o[4 * j + 3] *= factor[1];
    }
}

// Packs probabilities as the left operand of the product with the values.
template <class T, int L>
__device__ __forceinline__ void to_operand(const float (&s)[L], uint32_t (&p)[L / 8][4]) {
#pragma unroll
    for (int k = 0; k < L / 8; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack_pair<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
    }
}

// Transposes a 4 x 4 matrix of words. Four neighbouring lanes hold one row each.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i | step], step);
            if (upper) w[i] = got;
            else w[i | step] = got;
        }
    }
}

// Writes a thread's part of a row: 16 bytes per lane, after an exchange among the four lanes of the
// row. The stores leave the L2 cache to keys and values.
template <class T, int D>
__device__ __forceinline__ void store_row(T* out, const float (&o)[D / 2], int h, float factor, bool valid) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < D / 8; j += 4) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = j + i < D / 8 ? 4 * (j + i) + 2 * h : 0;
            w[i] = pack_pair<T>(o[at] * factor, o[at + 1] * factor);
        }
        transpose_quad(w);
        if (valid && j + lane < D / 8) __stcs(reinterpret_cast<uint4*>(out + (j + lane) * 8), make_uint4(w[0], w[1], w[2], w[3]));
    }
}
template <int D>
__device__ __forceinline__ void store_row_f32(float* out, const float (&o)[D / 2], int h, float factor, bool valid) {
    const int lane = threadIdx.x % 4, odd = lane % 2;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        // Even lanes write block j, odd lanes block j + 1, four elements each.
        const float *x = o + 4 * j + 2 * h, *y = x + 4;
        const float first = __shfl_xor_sync(~0u, odd ? x[0] : y[0], 1), second = __shfl_xor_sync(~0u, odd ? x[1] : y[1], 1);
        const float4 four = odd ? make_float4(first, second, y[0], y[1]) : make_float4(x[0], x[1], first, second);
        const float4 scaled = make_float4(four.x * factor, four.y * factor, four.z * factor, four.w * factor);
        if (valid) __stcs(reinterpret_cast<float4*>(out + (j + odd) * 8 + lane / 2 * 4), scaled);
    }
}

// Writes a warp's 16 rows of outputs and their log-sum-exps.
template <class T, int D>
__device__ __forceinline__ void store_rows(const PrefillArgs& a, const Tile& tile, const Rows& rows, const float (&o)[D / 2], Softmax& softmax) {
    softmax.finish();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int64_t row = int64_t(tile.first_token + rows.token[h]) * a.heads + tile.first_head + rows.head[h];
        if (a.out_f32) store_row_f32<D>(reinterpret_cast<float*>(a.out) + row * D, o, h, softmax.inverse(h), rows.valid[h]);
        else store_row<T, D>(reinterpret_cast<T*>(a.out) + row * D, o, h, softmax.inverse(h), rows.valid[h]);
        if (rows.valid[h] && threadIdx.x % 4 == 0) reinterpret_cast<float*>(a.lse)[row] = softmax.lse(h);
    }
}

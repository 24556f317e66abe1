// Scores of tiles of 32 tokens. Codes are the large operand of the tensor cores (16 rows), the
// columns the small one. Scales of channels multiply the queries, and their minima use a separate
// product. Scales of tokens multiply the scores.
#pragma once
#include "columns.cuh"
#include "levels.cuh"

namespace kvq {

// Returns rows 16 `f` to 16 `f` + 15 of a unit as the large operand of the tensor cores, from a
// lane's words of the unit.
template <class S>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t* words, int f) {
    if constexpr (S::CODES == Codes::LEVELS) {
        look_up<S::BITS>(a, words[f]);
    } else if constexpr (S::BITS == 8) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t x = words[2 * f + i];
            if constexpr (S::CODES == Codes::E5M2) {
                a[i] = x << 8 & 0xff00ff00u, a[i + 2] = x & 0xff00ff00u;
            } else if constexpr (S::CODES == Codes::E4M3) {
                a[i] = (x << 8 & 0x80008000u) | (x << 7 & 0x3f803f80u), a[i + 2] = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
            } else {
                a[i] = x & 0x00ff00ffu, a[i + 2] = x >> 8 & 0x00ff00ffu;
            }
        }
    } else {
        constexpr int FIELD = Packing<S::BITS>::FIELD;
        uint32_t x = FIELD == 4 ? words[f] : words[0];
        uint32_t y = x >> 8;
        uint32_t low = FIELD == 4 ? 0x000f000fu : 0x00030003u << (4 * f);
        uint32_t high = low << FIELD;
        a[0] = x & low, a[1] = x & high, a[2] = y & low, a[3] = y & high;
    }
}

constexpr uint32_t ONES = 0x3c003c00u;  // two f16

// Prepares the queries for the scores of a record or, without parameters per channel, of all
// records: their products with the scales, and the sums of their products with the minima. Without
// parameters per channel these are the queries and their sums.
template <class L, int N>
__device__ __forceinline__ void scale_queries(uint32_t (&scaled)[L::D / 16][N][2], float (&bias)[N][4], const unsigned char* header, const unsigned char* queries,
                                              int lane) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) bias[n][i] = 0.f;
#pragma unroll
    for (int j = 0; j < L::D / 32; j++) {
        uint4 scale, min = make_uint4(ONES, ONES, ONES, ONES);
        if constexpr (L::K_BY_CHANNEL) {
            scale = load16(header + L::K_SCALE + j * 64 + lane % 4 * 16);
            min = load16(header + L::K_MIN + j * 64 + lane % 4 * 16);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint4 q = load16(queries + (n * (L::D / 32) + j) * 512 + lane * 16);
            mma(bias[n], {min.x, min.x, min.y, min.y}, q.x, q.y);
            mma(bias[n], {min.z, min.z, min.w, min.w}, q.z, q.w);
            if constexpr (L::K_BY_CHANNEL) q = make_uint4(multiply(q.x, scale.x), multiply(q.y, scale.y), multiply(q.z, scale.z), multiply(q.w, scale.w));
            scaled[2 * j][n][0] = q.x, scaled[2 * j][n][1] = q.y;
            scaled[2 * j + 1][n][0] = q.z, scaled[2 * j + 1][n][1] = q.w;
        }
    }
}

// Converts the two f16 of each of two words to f32.
__device__ __forceinline__ void widen(float (&x)[4], uint2 words) {
    float2 low = __half22float2(half2_of(words.x)), high = __half22float2(half2_of(words.y));
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

// Computes the scores of a tile's 32 tokens; `scaled` and `bias` are outputs of `scale_queries`.
template <class L, int N>
__device__ __forceinline__ void packed_scores(float (&s)[2][N][4], const uint32_t (&scaled)[L::D / 16][N][2], const float (&bias)[N][4], const unsigned char* tile,
                                              float key_scale, int lane) {
    using S = typename L::Keys;
    using P = typename L::KPack;
    float sum[2][N][4] = {};
#pragma unroll
    for (int j = 0; j < L::D / 16 / P::UNITS; j++) {
        uint32_t words[P::UNITS * P::WORDS];
        P::load(words, tile + L::K_CODES, j, lane);
#pragma unroll
        for (int u = 0; u < P::UNITS; u++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t a[4];
                fragment<S>(a, words + u * P::WORDS, r);
#pragma unroll
                for (int n = 0; n < N; n++) mma(sum[r][n], a, scaled[j * P::UNITS + u][n][0], scaled[j * P::UNITS + u][n][1]);
            }
    }
    // The parameters of tokens g + 8 i.
    float scales[4], mins[4];
    if constexpr (L::K_BY_TOKEN) widen(scales, *reinterpret_cast<const uint2*>(tile + L::KT_SCALE + lane / 4 * 8));
    if constexpr (L::K_TOKEN_MIN) widen(mins, *reinterpret_cast<const uint2*>(tile + L::KT_MIN + lane / 4 * 8));
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = sum[r][n][i], factor = unscale<S>(2 * r + i / 2), b = bias[n][i % 2];
                float& y = s[r][n][i];
                if constexpr (L::KIVI) y = fmaf(x, factor, b);
                else if constexpr (S::PARAMS == Params::BALANCED) y = fmaf(x, factor, b) * scales[2 * r + i / 2];
                else if constexpr (S::PARAMS == Params::NONE) y = x * (factor * key_scale);
                else if constexpr (S::CODES == Codes::SIGNED) y = fmaf(b, -float(1 << (S::BITS - 1)), x * factor) * scales[2 * r + i / 2];
                else if constexpr (L::K_TOKEN_MIN) y = fmaf(x * factor, scales[2 * r + i / 2], b * mins[2 * r + i / 2]);
                else y = x * factor * scales[2 * r + i / 2];
            }
}

// Computes the scores of 32 tokens of the residual, which is short and is read directly from global
// memory. `place` returns the offset of a token's key. A lane reads 8 channels of a token at once:
// the order of the channels is free, if it is that of the queries.
template <int D, int N, class Place>
__device__ __forceinline__ void residual_scores(float (&s)[2][N][4], const void* keys, int kind, const unsigned char* queries, int lane, Place place) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint4 low[D / 32], high[D / 32];
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            low[j] = load_eight(keys, place(16 * r + g) + 32 * j + 8 * t);
            high[j] = load_eight(keys, place(16 * r + g + 8) + 32 * j + 8 * t);
        }
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            low[j] = to_f16(low[j], kind), high[j] = to_f16(high[j], kind);
#pragma unroll
            for (int n = 0; n < N; n++) {
                // Channels 8 t + 2 i of the block of 32 are word t of lane 4 g + i.
                uint32_t q[4];
#pragma unroll
                for (int i = 0; i < 4; i++) q[i] = *reinterpret_cast<const uint32_t*>(queries + (n * (D / 32) + j) * 512 + (4 * g + i) * 16 + 4 * t);
                mma(s[r][n], {low[j].x, high[j].x, low[j].y, high[j].y}, q[0], q[1]);
                mma(s[r][n], {low[j].z, high[j].z, low[j].w, high[j].w}, q[2], q[3]);
            }
        }
    }
}

}  // namespace kvq

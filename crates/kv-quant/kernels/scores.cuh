// Scores of tiles of 32 tokens. Codes are the large (16-row) operand of the tensor cores, the columns the small one; scales of keys multiply the
// queries, minima go through a product of their own.
#pragma once
#include "columns.cuh"

namespace kvq {

// Rows 16 `f` to 16 `f` + 15 of a unit as the tensor cores' large operand.
template <int BITS>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t* words, int f) {
    if constexpr (BITS == 8) {
        a[0] = words[2 * f] & 0x00ff00ffu, a[2] = (words[2 * f] >> 8) & 0x00ff00ffu;
        a[1] = words[2 * f + 1] & 0x00ff00ffu, a[3] = (words[2 * f + 1] >> 8) & 0x00ff00ffu;
    } else {
        uint32_t x = BITS == 4 ? words[f] : words[0];
        uint32_t y = x >> 8;
        uint32_t low = BITS == 4 ? 0x000f000fu : 0x00030003u << (4 * f);
        uint32_t high = low << BITS;
        a[0] = x & low, a[1] = x & high, a[2] = y & low, a[3] = y & high;
    }
}

// Scores of a tile's 32 tokens. `queries` are the block's, in fragments; `scaled` and `bias` are the record's, kept over its tiles.
template <class L, int N>
__device__ __forceinline__ void packed_scores(float (&s)[2][N][4], uint32_t (&scaled)[L::D / 16][N][2], float (&bias)[N][4],
                                              const unsigned char* header, const unsigned char* tile, const unsigned char* queries,
                                              bool first, int lane) {
    constexpr int D = L::D, BITS = L::BITS;
    float sum[2][N][4] = {};
    if (first) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) bias[n][i] = 0.f;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            uint4 scale = load16(header + L::K_SCALE + j * 64 + lane % 4 * 16);
            uint4 min = load16(header + L::K_MIN + j * 64 + lane % 4 * 16);
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 q = load16(queries + (n * (D / 32) + j) * 512 + lane * 16);
                mma(bias[n], {min.x, min.x, min.y, min.y}, q.x, q.y);
                mma(bias[n], {min.z, min.z, min.w, min.w}, q.z, q.w);
                scaled[2 * j][n][0] = multiply(q.x, scale.x), scaled[2 * j][n][1] = multiply(q.y, scale.y);
                scaled[2 * j + 1][n][0] = multiply(q.z, scale.z), scaled[2 * j + 1][n][1] = multiply(q.w, scale.w);
            }
        }
    }
    constexpr int UNITS = 4 / L::WORDS;  // in a lane's 16 bytes
#pragma unroll
    for (int j = 0; j < D / 16 / UNITS; j++) {
        uint4 loaded = load16(tile + L::K_CODES + j * 512 + lane * 16);
        uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t a[4];
                fragment<BITS>(a, words + u * L::WORDS, r);
#pragma unroll
                for (int n = 0; n < N; n++) mma(sum[r][n], a, scaled[j * UNITS + u][n][0], scaled[j * UNITS + u][n][1]);
            }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[r][n][i] = fmaf(sum[r][n][i], unscale<BITS>(2 * r + i / 2), bias[n][i % 2]);
}

// Scores of 32 tokens of the residual, read straight from memory: it is short. `place` gives where a token's keys begin.
template <int D, int N, class Place>
__device__ __forceinline__ void residual_scores(float (&s)[2][N][4], const void* keys, int kind, const unsigned char* queries, int lane, Place place) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        long long low = place(16 * r + g) + 2 * t, high = place(16 * r + g + 8) + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int channel = 32 * j + 16 * h;
                a[h][0] = load_pair(keys, low + channel, kind);
                a[h][1] = load_pair(keys, high + channel, kind);
                a[h][2] = load_pair(keys, low + channel + 8, kind);
                a[h][3] = load_pair(keys, high + channel + 8, kind);
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 q = load16(queries + (n * (D / 32) + j) * 512 + lane * 16);
                mma(s[r][n], a[0], q.x, q.y);
                mma(s[r][n], a[1], q.z, q.w);
            }
        }
    }
}

}  // namespace kvq

// Group tiles: the data of a chunk of 64 tokens that all heads of a group share, computed once.
// They are B, C and C B', in the layout of ssd_wgmma.cuh's shared memory, so one copy loads them.
#pragma once
#include "../args.cuh"
#include "../hopper.cuh"

namespace hybrid {

constexpr int SSD_TOKENS = 64, SSD_GROUP_TILES_THREADS = 128;
// Tiles of 16 x 16 of a 64 x 64 matrix, on and below the diagonal, row by row.
constexpr int SSD_TILES = 10;
__device__ constexpr int ssd_tile(int row, int column) { return row * (row + 1) / 2 + column; }

template <class T, int N>
struct SsdGroupTiles {
    Square<T> c[N / 64], b[N / 64];    // A row per token, 64 states each
    // C B' of the next chunk, whose weights are computed during this chunk's products; 0 above the
    // diagonal
    float scores[SSD_TILES][16 * 16];
};

// Returns the tiles of a group and entry. Those of chunk i are at i + 1. Those at 0 have only the
// first chunk's scores.
template <class T, int N>
__device__ SsdGroupTiles<T, N>* ssd_group_tiles_of(const Ssd& p, int entry, int group, int chunks) {
    return (SsdGroupTiles<T, N>*)p.scratch + ((long long)entry * p.groups + group) * (chunks + 1);
}

template <class T, int N>
struct SsdGroupTilesProducer {
    static constexpr int PIECES = N / 8;
    const Ssd& p;
    SsdGroupTiles<T, N>& group_tiles;  // In shared memory, without scores
    SsdGroupTiles<T, N>* to;

    // Loads C and B. Rows beyond the last token become zeros.
    __device__ void load() {
        const int chunk = blockIdx.x, group = blockIdx.y, left = p.tokens - chunk * SSD_TOKENS;
        const long long first = (long long)blockIdx.z * p.tokens + (long long)chunk * SSD_TOKENS;
        for (int i = threadIdx.x; i < SSD_TOKENS * PIECES; i += SSD_GROUP_TILES_THREADS) {
            const int t = i / PIECES, piece = i % PIECES, at = swizzled(t, piece % 8);
            const long long row = t < left ? first + t : first;
            copy16(&group_tiles.c[piece / 8][at], (const T*)p.c + row * p.c_row + group * N + piece * 8, t < left);
            copy16(&group_tiles.b[piece / 8][at], (const T*)p.b + row * p.b_row + group * N + piece * 8, t < left);
        }
        end_copies(), await_copies<0>();
        __syncthreads();
    }
    __device__ void store() {
        for (int i = threadIdx.x; i < SSD_TOKENS * PIECES * 2; i += SSD_GROUP_TILES_THREADS) ((uint4*)to[1].c)[i] = ((const uint4*)group_tiles.c)[i];
    }
    // Computes the scores of 16 tokens per warp with all tokens before them.
    __device__ void score() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
        float sums[4][2][4] = {};
#pragma unroll
        for (int k = 0; k < PIECES; k += 2) {
            uint32_t c_of[4], b_of[4];
            load_matrices(c_of, &group_tiles.c[k / 8][swizzled(warp * 16 + matrix % 2 * 8 + line, (k + matrix / 2) % 8)]);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                if (u > warp) break;
                load_matrices(b_of, &group_tiles.b[k / 8][swizzled(u * 16 + matrix / 2 * 8 + line, (k + matrix % 2) % 8)]);
                multiply<T>(sums[u][0], c_of, b_of[0], b_of[1]);
                multiply<T>(sums[u][1], c_of, b_of[2], b_of[3]);
            }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            if (u > warp) break;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = lane / 4 + e / 2 * 8, column = e % 2 * 8 + lane % 4 * 2;
                const float first = sums[u][e % 2][e / 2 * 2], second = sums[u][e % 2][e / 2 * 2 + 1];
                *reinterpret_cast<float2*>(&to->scores[ssd_tile(warp, u)][row * 16 + column]) =
                    make_float2(u < warp || column <= row ? first : 0.f, u < warp || column + 1 <= row ? second : 0.f);
            }
        }
    }
    __device__ void run() { load(), store(), score(); }
};

// Grid (tokens / 64, groups, batch), SSD_GROUP_TILES_THREADS threads.
template <class T>
__device__ void ssd_group_tiles(const Ssd& p) {
    __shared__ __align__(128) char memory[4 * sizeof(Square<T>)];
    const int chunk = blockIdx.x, chunks = gridDim.x;
    if (p.states == 64) {
        SsdGroupTilesProducer<T, 64>{p, *(SsdGroupTiles<T, 64>*)memory, ssd_group_tiles_of<T, 64>(p, blockIdx.z, blockIdx.y, chunks) + chunk}.run();
    } else {
        SsdGroupTilesProducer<T, 128>{p, *(SsdGroupTiles<T, 128>*)memory, ssd_group_tiles_of<T, 128>(p, blockIdx.z, blockIdx.y, chunks) + chunk}.run();
    }
}

}  // namespace hybrid

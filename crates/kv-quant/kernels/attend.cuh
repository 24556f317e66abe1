// Attention of a few queries of many sequences over their packed entries and full-precision
// residuals, split over positions, in one launch.
//
// A warp streams tiles of 32 tokens through its own ring in shared memory and keeps its own online
// softmax, so there is no barrier in the loop. Codes are the large operand of the tensor cores (16
// rows): 16 tokens of keys, or 16 channels of values. The columns (query heads of one kv head times
// queries) are the small operand. Scales of keys multiply the queries or the scores, scales of
// values the probabilities. Minima use a separate product, whose unused rows sum the probabilities.
#pragma once
#include <dependent.cuh>
#include "merge.cuh"
#include "scores.cuh"

namespace kvq {

// A warp's online softmax over the tokens processed so far, in units of the columns' scales.
template <int D, int N>
struct Running {
    float out[D / 16][N][4];  // channels x columns
    float zero[N][4];         // rows 0-7: the minima's part of each group of channels; rows 8-15: the sum of probabilities
    float max[N][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                zero[n][i] = 0.f;
#pragma unroll
                for (int c = 0; c < D / 16; c++) out[c][n][i] = 0.f;
            }
            max[n][0] = max[n][1] = -1e30f;
        }
    }

    __device__ __forceinline__ void rescale(int n, int e, float factor) {
        zero[n][e] *= factor, zero[n][e + 2] *= factor;
#pragma unroll
        for (int c = 0; c < D / 16; c++) out[c][n][e] *= factor, out[c][n][e + 2] *= factor;
    }

    // Processes the scores of 32 tokens (2 x 16 rows). Returns their probabilities as the small
    // operand of the tensor cores.
    __device__ __forceinline__ void step(float (&s)[2][N][4], const Columns<N>& columns, uint32_t (&p)[2][N][2]) {
        bool grows = false;
        float top[N][2];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                top[n][e] = fmaxf(fmaxf(s[0][n][e], s[0][n][e + 2]), fmaxf(s[1][n][e], s[1][n][e + 2]));
                grows |= top[n][e] > max[n][e];
            }
        // New maxima are rare after the first tiles.
        if (__any_sync(FULL, grows)) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float x = top[n][e];
                    x = fmaxf(x, __shfl_xor_sync(FULL, x, 4));
                    x = fmaxf(x, __shfl_xor_sync(FULL, x, 8));
                    x = fmaxf(fmaxf(x, __shfl_xor_sync(FULL, x, 16)), max[n][e]);
                    rescale(n, e, exp2_fast((max[n][e] - x) * columns.scale[n][e]));
                    max[n][e] = x;
                }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            float c0 = columns.scale[n][0], c1 = columns.scale[n][1];
            float m0 = max[n][0] * c0, m1 = max[n][1] * c1;
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float x = exp2_fast(fmaf(s[r][n][2 * h], c0, -m0)), y = exp2_fast(fmaf(s[r][n][2 * h + 1], c1, -m1));
                    p[r][n][h] = transpose(bits(__floats2half2_rn(x, y)));
                }
        }
    }
};

// Adds a tile's values, weighted with the probabilities.
template <class L, int N>
__device__ __forceinline__ void packed_values(Running<L::D, N>& running, const uint32_t (&p)[2][N][2], const unsigned char* tile, int lane) {
    using S = typename L::Values;
    using P = typename L::VPack;
    constexpr int D = L::D, G = L::VGROUPS;
    uint32_t scaled[G][N][2];
#pragma unroll
    for (int j = 0; j < D / 16 / P::UNITS; j++) {
        uint32_t words[P::UNITS * P::WORDS];
        P::load(words, tile + L::V_CODES, j, lane);
#pragma unroll
        for (int u = 0; u < P::UNITS; u++) {
            int unit = j * P::UNITS + u;
            int r = unit / (D / 32), block = unit % (D / 32);
            if (block == 0) {
                const unsigned char* params = tile + r * 32 * G + lane % 4 * 8 * L::PAIR;
                uint32_t scale[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
                for (int g = 0; g < G; g += L::PAIR) {
                    if constexpr (L::PAIR == 2) {
                        uint4 x = load16(params + L::V_SCALE + g * 32);
                        scale[0] = x.x, scale[1] = x.y, scale[2] = x.z, scale[3] = x.w;
                    } else if constexpr (L::V_BY_TOKEN) {
                        uint2 x = *reinterpret_cast<const uint2*>(params + L::V_SCALE);
                        scale[0] = x.x, scale[1] = x.y;
                    }
#pragma unroll
                    for (int i = 0; i < 2 * L::PAIR; i++)
#pragma unroll
                        for (int n = 0; n < N; n++) scaled[g + i / 2][n][i % 2] = L::V_BY_TOKEN ? multiply(p[r][n][i % 2], scale[i]) : p[r][n][i % 2];
                }
                int g = lane / 4;
                uint2 min = make_uint2(0, 0);
                if constexpr (L::V_TOKEN_MIN) {
                    if (g < G) min = *reinterpret_cast<const uint2*>(params + L::V_MIN + g / L::PAIR * 32 * L::PAIR + g % L::PAIR * 8);
                } else if constexpr (S::CODES == Codes::SIGNED) {
                    const uint32_t lowest = bits(__float2half2_rn(-float(1 << (S::BITS - 1))));
                    if (g == 0) min = make_uint2(multiply(scale[0], lowest), multiply(scale[1], lowest));
                }
#pragma unroll
                for (int n = 0; n < N; n++) mma(running.zero[n], {min.x, ONES, min.y, ONES}, p[r][n][0], p[r][n][1]);
            }
#pragma unroll
            for (int f = 0; f < 2; f++) {
                uint32_t a[4];
                fragment<S>(a, words + u * P::WORDS, f);
                int g = block * 32 / L::VGROUP;
#pragma unroll
                for (int n = 0; n < N; n++) mma(running.out[2 * block + f][n], a, scaled[g][n][0], scaled[g][n][1]);
            }
        }
    }
}

// The same for values with factors of channels; `factors` holds those of channels g + 8 i. Each
// block of 32 channels is multiplied after its sums are complete.
template <class L, int N>
__device__ __forceinline__ void balanced_values(Running<L::D, N>& running, const uint32_t (&p)[2][N][2], const unsigned char* tile, const uint4 (&factors)[L::D / 64], int lane) {
    using S = typename L::Values;
    using P = typename L::VPack;
    constexpr int BLOCKS = L::D / 32, STEP = P::UNITS < BLOCKS ? P::UNITS : BLOCKS;
    uint32_t scaled[2][N][2];
    float zero[N][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned char* params = tile + r * 32 + lane % 4 * 8;
        uint2 scale = *reinterpret_cast<const uint2*>(params + L::V_SCALE), min = make_uint2(0, 0);
        if (lane < 4) min = *reinterpret_cast<const uint2*>(params + L::V_MIN);
#pragma unroll
        for (int n = 0; n < N; n++) {
            scaled[r][n][0] = multiply(p[r][n][0], scale.x), scaled[r][n][1] = multiply(p[r][n][1], scale.y);
            mma(zero[n], {min.x, ONES, min.y, ONES}, p[r][n][0], p[r][n][1]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) running.zero[n][e + 2] += zero[n][e + 2], zero[n][e] = __shfl_sync(FULL, zero[n][e], lane % 4);
#pragma unroll
    for (int first = 0; first < BLOCKS; first += STEP) {
        uint32_t words[2][P::UNITS * P::WORDS];
#pragma unroll
        for (int r = 0; r < 2; r++) P::load(words[r], tile + L::V_CODES, (r * BLOCKS + first) / P::UNITS, lane);
#pragma unroll
        for (int u = 0; u < STEP; u++)
#pragma unroll
            for (int f = 0; f < 2; f++) {
                const int c = 2 * (first + u) + f;
                float sum[N][4] = {}, factor[4];
                const uint4 four = factors[c / 4];
                widen(factor, c % 4 < 2 ? make_uint2(four.x, four.y) : make_uint2(four.z, four.w));
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    uint32_t a[4];
                    fragment<S>(a, words[r] + ((r * BLOCKS + first) % P::UNITS + u) * P::WORDS, f);
#pragma unroll
                    for (int n = 0; n < N; n++) mma(sum[n], a, scaled[r][n][0], scaled[r][n][1]);
                }
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float value = fmaf(sum[n][i], unscale<S>(2 * c + i / 2), zero[n][i % 2]);
                        running.out[c][n][i] = fmaf(value, factor[c % 2 * 2 + i / 2], running.out[c][n][i]);
                    }
            }
    }
}

// Processes a warp's share of the packed tokens: every `warps`-th record of [record, end). Calls
// `ready`, which initialises queries and columns, after the first copies have started. Each lane
// prefetches the address of every 32nd of these records from the table.
template <class L, int N, int STAGES, class Ready>
__device__ __forceinline__ void packed_loop(Running<L::D, N>& running, const Columns<N>& columns, const HeadWork& work, float key_scale,
                                            const unsigned char* queries, unsigned char* ring, int warp, int warps, int lane, Ready ready) {
    const int record = work.from + warp, end = work.to, packed = work.packed;
    constexpr int STAGE = L::HEADER + L::TILE_BYTES;
    int tiles = record < end ? ((end - record + warps - 1) / warps) * L::TILES : 0;
    auto addresses = [&](int i) {
        int at = record + (i + lane) * warps;
        return at < end ? __ldg(work.table + at) : 0ull;
    };
    unsigned long long held = addresses(0), next = addresses(32);
    const unsigned char* source = nullptr;
    uint32_t ring_address = shared_address(ring);

    int issued = 0, issue_stage = 0;
    auto issue = [&]() {
        if (issued < tiles) {
            bool first = L::TILES == 1 || issued % L::TILES == 0;
            uint32_t target = ring_address + issue_stage * STAGE + (first ? 0 : L::HEADER);
            if (first) {
                const int i = issued / L::TILES;
                if (i % 32 == 0 && i > 0) held = next, next = addresses(i + 32);
                source = reinterpret_cast<const unsigned char*>(__shfl_sync(FULL, held, i % 32));
#pragma unroll
                for (int i = 0; i < STAGE; i += 512)
                    if (i + 512 <= STAGE || i + lane * 16 < STAGE) copy16(target + i + lane * 16, source + i + lane * 16);
                source += STAGE;
            } else {
#pragma unroll
                for (int i = 0; i < L::TILE_BYTES; i += 512)
                    if (i + 512 <= L::TILE_BYTES || i + lane * 16 < L::TILE_BYTES) copy16(target + i + lane * 16, source + i + lane * 16);
                source += L::TILE_BYTES;
            }
            issued++;
            issue_stage = issue_stage + 1 == STAGES ? 0 : issue_stage + 1;
        }
        copy_commit();
    };

#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) issue();
    ready();

    uint32_t scaled[L::D / 16][N][2];
    float bias[N][4];
    uint4 factors[L::D / 64];
    int stage = 0;
    for (int i = 0; i < tiles; i++) {
        copy_wait<STAGES - 2>();
        __syncwarp();  // Lanes read pieces copied by others, and the stage that is filled next is no longer read.
        issue();
        const unsigned char* header = ring + stage * STAGE;
        const unsigned char* tile = header + L::HEADER;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        int sub = L::TILES == 1 ? 0 : i % L::TILES;
        const int at = (record + i / L::TILES * warps) * L::GROUP + sub * TILE;
        if (at >= packed) continue;  // The values of these tokens are not packed yet.
        float s[2][N][4];
        if (L::K_BY_CHANNEL ? sub == 0 : i == 0) scale_queries<L, N>(scaled, bias, header, queries, lane);
        if constexpr (L::V_FACTORS) {
            if (sub == 0) {
#pragma unroll
                for (int j = 0; j < L::D / 64; j++) factors[j] = load16(header + L::V_FACTOR + lane / 4 * (L::D / 4) + j * 16);
            }
        }
        packed_scores<L, N>(s, scaled, bias, tile, key_scale, lane);
        restrict<N>(s, columns, work, at, packed, lane);
        uint32_t p[2][N][2];
        running.step(s, columns, p);
        if constexpr (L::V_FACTORS) {
            balanced_values<L, N>(running, p, tile, factors, lane);
        } else {
            packed_values<L, N>(running, p, tile, lane);
        }
    }
}

// Processes a warp's share of the residual: every `warps`-th tile of 32 tokens.
template <int D, int N>
__device__ __forceinline__ void residual_loop(Running<D, N>& running, const Columns<N>& columns, const AttendArgs& args, const HeadWork& work,
                                              const unsigned char* queries, int warp, int warps, int lane) {
    const int g = lane / 4, t = lane % 4, packed = work.packed, len = work.residual;
    for (int at = warp * TILE; at < len; at += warps * TILE) {
        auto place = [&](int token) {  // Tokens past the end are masked; any finite token can be read.
            int i = work.ring_start + min(at + token, len - 1);
            return (i >= args.ring ? i - args.ring : i) * (long long)D;
        };
        float s[2][N][4] = {};
        residual_scores<D, N>(s, work.ring_k, args.kind, queries, lane, place);
        restrict<N>(s, columns, work, packed + at, packed + len, lane);
        uint32_t p[2][N][2];
        running.step(s, columns, p);
        // Row g of a product is channel 2 c of the D / 8 channels of lanes 4 g to 4 g + 3, row g + 8
        // the next one: a lane reads all its channels of a token at once.
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint4 rows[4][D / 64];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < D / 64; j++) rows[i][j] = load_eight(work.ring_v, place(16 * r + 2 * t + i / 2 * 8 + i % 2) + g * (D / 8) + 8 * j);
#pragma unroll
            for (int n = 0; n < N; n++) mma(running.zero[n], {0u, ONES, 0u, ONES}, p[r][n][0], p[r][n][1]);
#pragma unroll
            for (int j = 0; j < D / 64; j++) {
                uint32_t words[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint4 x = to_f16(rows[i][j], args.kind);
                    words[i][0] = x.x, words[i][1] = x.y, words[i][2] = x.z, words[i][3] = x.w;
                }
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] = permute(words[i / 2 * 2][w], words[i / 2 * 2 + 1][w], i % 2 ? 0x7632 : 0x5410);
#pragma unroll
                    for (int n = 0; n < N; n++) mma(running.out[4 * j + w][n], a, p[r][n][0], p[r][n][1]);
                }
            }
        }
    }
}

// Grid: one thread block per item of `work`. A dependent launch follows the copy to the rings. It reads
// lists, tables and records while that kernel runs, and waits before it reads queries and rings.
template <class L, int N, int WARPS, int STAGES>
__device__ __forceinline__ void attend(const AttendArgs& args) {
    start_next_kernel();
    constexpr int D = L::D;
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int QUERIES = N * 16 * D, STAGE = L::HEADER + L::TILE_BYTES, PITCH = D + 4;
    __shared__ float factors[8 * N], warp_max[WARPS][8 * N], warp_sum[WARPS][8 * N];
    __shared__ bool last;
    unsigned char* queries = shared;
    unsigned char* ring = shared + QUERIES + threadIdx.x / 32 * (STAGES * STAGE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const HeadWork work(args, blockIdx.x);
    if (work.queries == 0) {
        wait_for_previous_kernel();
        return;
    }
    const int valid = min(args.heads_per_kv * work.queries - work.first_column, 8 * N);
    Columns<N> columns;
    const bool coded = work.from >= 0;
    auto ready = [&]() {
        wait_for_previous_kernel();
        load_queries<D, N>(args, work, work.first_column, valid, coded && args.rotated & ROTATED_KEYS, queries, factors);
        __syncthreads();
        columns = columns_of<N>(args, factors, work.queries, work.first_column, entries_of(work), lane);
    };

    Running<D, N> running;
    running.clear();
    if (coded) {
        packed_loop<L, N, STAGES>(running, columns, work, args.key_scale, queries, ring, warp, WARPS, lane, ready);
    } else {
        ready();
        residual_loop<D, N>(running, columns, args, work, queries, warp, WARPS, lane);
    }

    // Merge the results of the block's warps.
    __syncthreads();  // All warps have finished with the ring, which now stores their outputs.
    float* outs = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int column = 8 * n + 2 * t + e;
            if (g == 0) warp_max[warp][column] = running.max[n][e] * columns.scale[n][e], warp_sum[warp][column] = running.zero[n][e + 2];
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                float zero = L::V_FACTORS ? 0.f : __shfl_sync(FULL, running.zero[n][e], c * 16 / L::VGROUP * 4 + t);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float factor = coded && !L::V_FACTORS ? unscale<typename L::Values>(2 * c + h) : 1.f;
                    if (!L::V_BY_TOKEN && coded) factor *= args.value_scale;
                    const int channel = coded ? 16 * c + 8 * h + g : D / 8 * g + 2 * c + h;
                    outs[(warp * 8 * N + column) * PITCH + channel] = fmaf(running.out[c][n][e + 2 * h], factor, zero);
                }
            }
        }
    __syncthreads();
    // The block's outputs replace warp 0's; `factors` receives their log-sum-exps.
    for (int i = threadIdx.x; i < valid * D; i += WARPS * 32) {
        int column = i / D, channel = i % D;
        float top = warp_max[0][column];
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_max[w][column]);
        float sum = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2_fast(warp_max[w][column] - top);
            sum = fmaf(warp_sum[w][column], factor, sum);
            value = fmaf(outs[(w * 8 * N + column) * PITCH + channel], factor, value);
        }
        outs[column * PITCH + channel] = sum > 0.f ? value / sum : 0.f;
        if (channel == 0) factors[column] = sum > 0.f ? top + log2f(sum) : -INFINITY;
    }
    __syncthreads();
    for (int column = warp; column < valid; column += WARPS) {
        float x[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = outs[column * PITCH + i * 32 + lane];
        if (coded && args.rotated & ROTATED_VALUES) hadamard<D>(x, lane);
        long long at = (long long)(work.first_part + work.part) * (8 * N) + column, row = row_of(args, work, work.first_column + column);
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            if (work.parts == 1) finish<D>(args, row, i * 32 + lane, x[i], factors[column]);
            else args.part_out[at * D + i * 32 + lane] = x[i];
        }
        if (work.parts > 1 && lane == 0) args.part_lse[at] = factors[column];
    }
    if (work.parts == 1) return;

    // The last block to arrive merges the partial results.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(args.arrived + work.merge, 1u) == work.parts - 1;
        if (last) args.arrived[work.merge] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    merge_splits<D, N, WARPS>(args, work, valid, shared, warp_max[0], warp_sum[0]);
}

// Bytes of dynamic shared memory.
template <class L, int N, int WARPS, int STAGES>
constexpr int attend_shared() {
    int ring = N * 16 * L::D + WARPS * STAGES * (L::HEADER + L::TILE_BYTES), outs = WARPS * 8 * N * (L::D + 4) * 4;
    return ring > outs ? ring : outs;
}

}  // namespace kvq

// Quantizes and packs records of KVarN's schemes (arXiv 2606.03458), as in
// src/quantize/variance.rs. A thread block rotates a record's keys or values and divides rows and
// columns by factors that equalize their variances. A warp has its rows in registers; lane l has
// columns 32 i + l. So statistics of rows are computed within a warp, and those of columns through
// shared memory.
#pragma once
#include "hadamard.cuh"
#include "tokens.cuh"

namespace kvq {

constexpr int BALANCE_ROUNDS = 8;

template <class L>
__host__ __device__ constexpr int balance_threads() {
    return L::D > 128 ? 512 : 256;
}

// Packs a tile's codes into words. `codes` has a row of PITCH bytes per token.
template <class L, bool VALUES>
__device__ __forceinline__ void write_words(const unsigned char* codes, unsigned char* tile, int pitch) {
    using P = Packing<VALUES ? L::Values::BITS : L::Keys::BITS>;
    constexpr int BLOCKS = L::D / 32;
    for (int item = threadIdx.x; item < L::D / 16 / P::UNITS * LANES; item += blockDim.x) {
        const int chunk = item / LANES, lane = item % LANES;
        uint32_t words[P::UNITS * P::WORDS];
#pragma unroll
        for (int u = 0; u < P::UNITS; u++) {
            const int unit = chunk * P::UNITS + u;
            P::unit(words + u * P::WORDS, lane, [&](int row, int column) {
                return VALUES ? codes[(unit / BLOCKS * 16 + column) * pitch + unit % BLOCKS * 32 + row] : codes[row * pitch + unit * 16 + column];
            });
        }
        P::store(words, tile + (VALUES ? L::V_CODES : L::K_CODES), chunk, lane);
    }
}

// Reduces V numbers of each lane over a warp, halving their number at each step. Lane l gets result
// l V / 32.
template <int HALF, int BIT, int V, class Combine>
__device__ __forceinline__ void scatter_step(float (&x)[V], Combine combine) {
    if constexpr (HALF > 0) {
        const bool upper = threadIdx.x & BIT;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float kept = upper ? x[i + HALF] : x[i], sent = upper ? x[i] : x[i + HALF];
            x[i] = combine(kept, __shfl_xor_sync(FULL, sent, BIT));
        }
    } else {
        x[0] = combine(x[0], __shfl_xor_sync(FULL, x[0], BIT));
    }
    if constexpr (BIT > 1) scatter_step<HALF / 2, BIT / 2>(x, combine);
}

template <int V, class Combine>
__device__ __forceinline__ float scatter_over_warp(float (&x)[V], Combine combine) {
    scatter_step<V / 2, 16>(x, combine);
    return x[0];
}

__device__ __forceinline__ float warp_max(float x) {
    float all[1] = {x};
    return scatter_over_warp<1>(all, [](float a, float b) { return fmaxf(a, b); });
}

// The factor of a row or a column, and the standard deviation after division by it.
struct Factor {
    float logarithm = 0.f, inverse = 1.f, deviation = 1.f;
    float best = 0.f;  // the logarithm after the iteration with the most even deviations

    // Multiplies the factor by the deviation, and updates the deviation accordingly.
    __device__ __forceinline__ void update() {
        const float before = inverse;
        logarithm = fminf(fmaxf(logarithm + logf(fminf(fmaxf(deviation, 1e-3f), 1e3f)), -0.3f), 10.f);
        inverse = __frcp_rn(expf(logarithm));
        deviation *= inverse / before;
    }

    __device__ __forceinline__ void measured(float sum, float squares, int count) {
        deviation = sqrtf(fmaxf(squares - sum * sum / count, 0.f) / (count - 1)) * inverse;
    }
};

template <class L>
struct Balance {
    static constexpr int D = L::D, T = L::GROUP, PITCH = D + 8, WARPS = balance_threads<L>() / 32, ROWS = T / WARPS, SLICE = D / 32;

    // Shared memory.
    float row_inverse[T], column_inverse[D];
    float first[D];           // the first row
    float parts[2][WARPS][D];  // partial sums of columns
    float spreads[2][2][WARPS];
    float scale[T > D ? T : D], min[T > D ? T : D];
    unsigned char codes[T * PITCH];

    // The registers of a thread.
    struct Own {
        float x[ROWS][SLICE];
        Factor row;     // factor of row `row_of`, the same in several lanes
        Factor column;  // factor of column threadIdx.x, if it exists
    };

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ bool has_column() { return threadIdx.x < D; }
    static __device__ __forceinline__ int row_of() { return warp() * ROWS + lane() % 16 * ROWS / 16; }

    __device__ __forceinline__ void share_row(const Own& own) {
        row_inverse[row_of()] = own.row.inverse;
        __syncwarp();
    }

    __device__ __forceinline__ void share_column(const Own& own) {
        if (has_column()) column_inverse[threadIdx.x] = own.column.inverse;
        __syncthreads();
    }

    __device__ __forceinline__ void measure_rows(Own& own) {
        float sums[2 * ROWS], inverse[SLICE];
#pragma unroll
        for (int i = 0; i < SLICE; i++) inverse[i] = column_inverse[32 * i + lane()];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            sums[r] = sums[ROWS + r] = 0.f;
#pragma unroll
            for (int i = 0; i < SLICE; i++) {
                const float y = own.x[r][i] * inverse[i];
                sums[r] += y, sums[ROWS + r] = fmaf(y, y, sums[ROWS + r]);
            }
        }
        const float sum = scatter_over_warp<2 * ROWS>(sums, [](float a, float b) { return a + b; });
        const float squares = __shfl_sync(FULL, sum, lane() | 16);
        own.row.measured(__shfl_sync(FULL, sum, lane() & 15), squares, D);
    }

    // Sums differences from the first row, because a large mean of a column would cancel digits.
    __device__ __forceinline__ void measure_columns(Own& own) {
        float sum[SLICE] = {}, squares[SLICE] = {};
        const float of_first = row_inverse[0];
        float origin[SLICE];
#pragma unroll
        for (int i = 0; i < SLICE; i++) origin[i] = first[32 * i + lane()] * of_first;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float inverse = row_inverse[warp() * ROWS + r];
#pragma unroll
            for (int i = 0; i < SLICE; i++) {
                const float y = fmaf(own.x[r][i], inverse, -origin[i]);
                sum[i] += y, squares[i] = fmaf(y, y, squares[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < SLICE; i++) parts[0][warp()][32 * i + lane()] = sum[i], parts[1][warp()][32 * i + lane()] = squares[i];
        __syncthreads();
        if (!has_column()) return;
        float all = 0.f, all_squares = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all += parts[0][w][threadIdx.x], all_squares += parts[1][w][threadIdx.x];
        own.column.measured(all, all_squares, T);
    }

    // Returns the ratio of the largest to the smallest deviation of rows, plus that of columns.
    __device__ __forceinline__ float spread(const Own& own) {
        const float column = has_column() ? own.column.deviation : own.row.deviation;
        const float highs[2] = {warp_max(own.row.deviation), warp_max(column)}, lows[2] = {-warp_max(-own.row.deviation), -warp_max(-column)};
        if (lane() < 2) spreads[0][lane()][warp()] = lane() ? highs[1] : highs[0], spreads[1][lane()][warp()] = lane() ? lows[1] : lows[0];
        __syncthreads();
        float sum = 0.f;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float high = 0.f, low = INFINITY;
#pragma unroll
            for (int w = 0; w < (side ? D / 32 : WARPS); w++) high = fmaxf(high, spreads[0][side][w]), low = fminf(low, spreads[1][side][w]);
            sum += high / fmaxf(low, 1e-8f);
        }
        return sum;
    }

    template <bool VALUES>
    __device__ __forceinline__ void find(Own& own) {
        share_row(own), share_column(own);
        measure_rows(own), measure_columns(own);
        float best = INFINITY;
        for (int round = 0; round <= BALANCE_ROUNDS; round++) {
            if (round > 0 && VALUES) {
                own.column.update(), share_column(own);
                measure_rows(own), own.row.update(), share_row(own);
                __syncthreads();  // All threads read the first row's factor.
                measure_columns(own);
            } else if (round > 0) {
                own.row.update(), share_row(own);
                __syncthreads();
                measure_columns(own), own.column.update(), share_column(own);
                measure_rows(own);
            }
            const float now = spread(own);
            if (now <= best) best = now, own.row.best = own.row.logarithm, own.column.best = own.column.logarithm;
        }
    }

    // Computes scales and minima from the extremes of rows (VALUES) or columns.
    template <bool VALUES>
    __device__ __forceinline__ void settle(const Own& own, float largest) {
        auto combine = [](float a, float b) { return fmaxf(a, b); };
        float high = -INFINITY, low = -INFINITY;  // low is the maximum of the negated numbers
        if (VALUES) {
            float all[2 * ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                all[r] = all[ROWS + r] = -INFINITY;
#pragma unroll
                for (int i = 0; i < SLICE; i++) all[r] = fmaxf(all[r], own.x[r][i]), all[ROWS + r] = fmaxf(all[ROWS + r], -own.x[r][i]);
            }
            high = scatter_over_warp<2 * ROWS>(all, combine);
            low = __shfl_sync(FULL, high, lane() | 16), high = __shfl_sync(FULL, high, lane() & 15);
        } else {
#pragma unroll
            for (int i = 0; i < SLICE; i++) {
                float most = -INFINITY, least = -INFINITY;
#pragma unroll
                for (int r = 0; r < ROWS; r++) most = fmaxf(most, own.x[r][i]), least = fmaxf(least, -own.x[r][i]);
                parts[0][warp()][32 * i + lane()] = most, parts[1][warp()][32 * i + lane()] = least;
            }
            __syncthreads();
            if (has_column())
#pragma unroll
                for (int w = 0; w < WARPS; w++) high = fmaxf(high, parts[0][w][threadIdx.x]), low = fmaxf(low, parts[1][w][threadIdx.x]);
        }
        if (!VALUES && !has_column()) return;
        const int i = VALUES ? row_of() : threadIdx.x;
        min[i] = -low, scale[i] = fmaxf(__fdiv_rn(high + low, largest), 1e-10f);
    }

    template <bool VALUES>
    __device__ __forceinline__ void encode(Own& own, float largest) {
        row_inverse[row_of()] = expf(own.row.best);  // from here on the factor, not its inverse
        if (has_column()) column_inverse[threadIdx.x] = expf(own.column.best);
        __syncthreads();
        float column[SLICE], by_column[SLICE];
#pragma unroll
        for (int i = 0; i < SLICE; i++) column[i] = column_inverse[32 * i + lane()], by_column[i] = __frcp_rn(column[i]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float row = row_inverse[warp() * ROWS + r], by_row = __frcp_rn(row);
#pragma unroll
            for (int i = 0; i < SLICE; i++) {
                float& x = own.x[r][i];
                x = VALUES ? divide(divide(x, column[i], by_column[i]), row, by_row) : divide(divide(x, row, by_row), column[i], by_column[i]);
            }
        }
        settle<VALUES>(own, largest);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < SLICE; i++) {
                const int row = warp() * ROWS + r, c = 32 * i + lane(), k = VALUES ? row : c;
                codes[row * PITCH + c] = int(rintf(fminf(divide(own.x[r][i] - min[k], scale[k], __frcp_rn(scale[k])), largest)));
            }
        __syncthreads();
    }

    template <bool VALUES>
    __device__ __forceinline__ void load(Own& own, const FillArgs& args, const HeadRow& row, int record) {
        const int entry = record * T + warp() * ROWS;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool in_ring = entry + r < row.first_new;
            const void* from = in_ring ? (VALUES ? row.ring_v : row.ring_k) : static_cast<const void*>(VALUES ? row.new_v : row.new_k);
            const long long at = in_ring ? (entry + r + row.shift) % args.ring * D : (entry + r - row.first_new) * (VALUES ? args.v_token : args.k_token);
#pragma unroll
            for (int i = 0; i < SLICE; i++) own.x[r][i] = load_as_float(from, at + 32 * i + lane(), args.kind);
        }
        auto check = [&](int r) {
            bool bad = false;
#pragma unroll
            for (int i = 0; i < SLICE; i++) bad |= !(fabsf(own.x[r][i]) <= LARGEST);
            if (bad) report(args, row, VALUES, entry + r, lane());
        };
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            check(r);
            if (args.rotated & (VALUES ? ROTATED_VALUES : ROTATED_KEYS)) hadamard<D>(own.x[r], lane()), check(r);
        }
        if (warp() > 0) return;
#pragma unroll
        for (int i = 0; i < SLICE; i++) first[32 * i + lane()] = own.x[0][i];
    }

    template <bool VALUES>
    __device__ __forceinline__ void record(const FillArgs& args, const HeadRow& row, int record) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
        Own own;
        load<VALUES>(own, args, row, record);
        find<VALUES>(own);
        encode<VALUES>(own, (1 << S::BITS) - 1);
        unsigned char* to = record_at(args, row, record, !VALUES && threadIdx.x == 0);
        for (int t = 0; t < L::TILES; t++) write_words<L, VALUES>(codes + t * TILE * PITCH, to + L::HEADER + t * L::TILE_BYTES, PITCH);
        auto half_at = [](unsigned char* p, int i) -> __half& { return reinterpret_cast<__half*>(p)[i]; };
        for (int r = threadIdx.x; r < T; r += blockDim.x) {
            unsigned char* tile = to + L::HEADER + r / TILE * L::TILE_BYTES;
            const int token = r % TILE;
            const float factor = row_inverse[r];
            if (VALUES) {
                half_at(tile + L::V_SCALE, L::value_param_at(token, 0)) = __float2half_rn(factor * scale[r]);
                half_at(tile + L::V_MIN, L::value_param_at(token, 0)) = __float2half_rn(factor * min[r]);
            } else {
                half_at(tile + L::KT_SCALE, L::key_token_at(token)) = __float2half_rn(factor);
            }
        }
        for (int c = threadIdx.x; c < D; c += blockDim.x) {
            const float factor = column_inverse[c];
            if (VALUES) {
                half_at(to + L::V_FACTOR, L::factor_at(c)) = __float2half_rn(factor);
            } else {
                half_at(to + L::K_SCALE, L::key_param_at(c)) = __float2half_rn(factor * scale[c]);
                half_at(to + L::K_MIN, L::key_param_at(c)) = __float2half_rn(factor * min[c]);
            }
        }
    }

    __device__ __forceinline__ void run(const FillArgs& args) {
        const HeadRow row(args, blockIdx.y);
        const int block = blockIdx.x;
        if (blockIdx.z == 0) {
            if (block < row.key_records) record<false>(args, row, row.key_record + block);
        } else if (block < row.value_tiles / L::TILES) {
            record<true>(args, row, row.value_tile / L::TILES + block);
        }
    }
};

// Bytes of dynamic shared memory.
template <class L>
__host__ __device__ constexpr int balance_shared() {
    constexpr int T = L::GROUP, D = L::D, WARPS = balance_threads<L>() / 32, MOST = T > D ? T : D;
    return 4 * (T + 2 * D + 2 * WARPS * D + 4 * WARPS + 2 * MOST) + T * (D + 8);
}

// Grid: (the largest number of records of keys or of values in a row, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_balanced(const FillArgs& args) {
    static_assert(sizeof(Balance<L>) == balance_shared<L>());
    extern __shared__ __align__(128) unsigned char balance[];
    reinterpret_cast<Balance<L>*>(balance)->run(args);
}

}  // namespace kvq

// Quantizes and packs records of KVarN's schemes (arXiv 2606.03458), as src/quantize/variance.rs does: a block takes a record's keys or values, rotates them,
// and divides rows and columns by factors that even out their variances, in shared memory.
#pragma once
#include "tokens.cuh"

namespace kvq {

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, i));
    return x;
}

constexpr int BALANCE_THREADS = 256, BALANCE_ROUNDS = 8;

// Factors of rows or of columns.
template <int N>
struct Side {
    float logarithm[N], inverse[N], deviation[N];
    float best[N];  // the factors of the round that left the deviations most even

    // Divides by the deviations, too: they change by as much.
    __device__ __forceinline__ void update() {
        for (int i = threadIdx.x; i < N; i += BALANCE_THREADS) {
            logarithm[i] = fminf(fmaxf(logarithm[i] + logf(fminf(fmaxf(deviation[i], 1e-3f), 1e3f)), -0.3f), 10.f);
            const float before = inverse[i];
            inverse[i] = __frcp_rn(expf(logarithm[i]));
            deviation[i] *= inverse[i] / before;
        }
        __syncthreads();
    }

    // The largest deviation over the least, for one warp.
    __device__ __forceinline__ float spread() const {
        float low = INFINITY, high = 0.f;
        for (int i = threadIdx.x % 32; i < N; i += 32) low = fminf(low, deviation[i]), high = fmaxf(high, deviation[i]);
        return warp_max(high) / fmaxf(-warp_max(-low), 1e-8f);
    }

    __device__ __forceinline__ void keep() {
        for (int i = threadIdx.x; i < N; i += BALANCE_THREADS) best[i] = expf(logarithm[i]);
    }
};

template <class L>
struct Balance {
    static constexpr int D = L::D, T = L::GROUP, PITCH = D + 8, PARTS = BALANCE_THREADS / D;
    static_assert(PARTS >= 1);

    float x[T * D];
    Side<T> rows;
    Side<D> columns;
    float scale[T > D ? T : D], min[T > D ? T : D];
    float parts[2][BALANCE_THREADS];
    float spreads[2];
    unsigned char codes[T * PITCH];

    // From sums of the differences to a first number: no digits are lost to a mean.
    static __device__ __forceinline__ float deviation_of(float sum, float squares, int count) {
        return sqrtf(fmaxf(squares - sum * sum / count, 0.f) / (count - 1));
    }

    // A warp takes ROWS rows at a time: their sums take as long as those of one.
    __device__ __forceinline__ void measure_rows() {
        constexpr int ROWS = 4;
        const int lane = threadIdx.x % 32;
        float inverse[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) inverse[i] = columns.inverse[32 * i + lane];
        for (int r = threadIdx.x / 32 * ROWS; r < T; r += BALANCE_THREADS / 32 * ROWS) {
            float sum[ROWS] = {}, squares[ROWS] = {};
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                const float first = x[(r + k) * D] * columns.inverse[0];
#pragma unroll
                for (int i = 0; i < D / 32; i++) {
                    const float y = fmaf(x[(r + k) * D + 32 * i + lane], inverse[i], -first);
                    sum[k] += y, squares[k] = fmaf(y, y, squares[k]);
                }
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
#pragma unroll
                for (int k = 0; k < ROWS; k++) {
                    sum[k] += __shfl_xor_sync(FULL, sum[k], step);
                    squares[k] += __shfl_xor_sync(FULL, squares[k], step);
                }
#pragma unroll
            for (int k = 0; k < ROWS; k++)
                if (lane == k) rows.deviation[r + k] = deviation_of(sum[k], squares[k], D) * rows.inverse[r + k];
        }
        __syncthreads();
    }

    __device__ __forceinline__ void measure_columns() {
        const int c = threadIdx.x % D, part = threadIdx.x / D;
        const float first = x[c] * rows.inverse[0];
        float sum = 0.f, squares = 0.f;
#pragma unroll 8
        for (int r = part * (T / PARTS); r < (part + 1) * (T / PARTS); r++) {
            const float y = fmaf(x[r * D + c], rows.inverse[r], -first);
            sum += y, squares = fmaf(y, y, squares);
        }
        parts[0][threadIdx.x] = sum, parts[1][threadIdx.x] = squares;
        __syncthreads();
        if (part == 0) {
#pragma unroll
            for (int p = 1; p < PARTS; p++) sum += parts[0][p * D + c], squares += parts[1][p * D + c];
            columns.deviation[c] = deviation_of(sum, squares, T) * columns.inverse[c];
        }
        __syncthreads();
    }

    template <bool VALUES>
    __device__ __forceinline__ void find() {
        for (int i = threadIdx.x; i < T; i += BALANCE_THREADS) rows.logarithm[i] = 0.f, rows.inverse[i] = 1.f;
        for (int i = threadIdx.x; i < D; i += BALANCE_THREADS) columns.logarithm[i] = 0.f, columns.inverse[i] = 1.f;
        __syncthreads();
        float best = INFINITY;
        for (int round = 0; round <= BALANCE_ROUNDS; round++) {
            if (round > 0) {
                if (VALUES) columns.update(), measure_rows(), rows.update();
                else rows.update(), measure_columns(), columns.update();
            }
            if (!VALUES || round == 0) measure_rows();
            if (VALUES || round == 0) measure_columns();
            if (threadIdx.x < 32) spreads[0] = rows.spread();
            else if (threadIdx.x < 64) spreads[1] = columns.spread();
            __syncthreads();
            const float spread = spreads[0] + spreads[1];
            if (spread <= best) best = spread, rows.keep(), columns.keep();
            __syncthreads();
        }
    }

    // The extremes of a row or of a column become its scale and its minimum.
    __device__ __forceinline__ void settle(int i, float low, float high, float largest) { min[i] = low, scale[i] = fmaxf(__fdiv_rn(high - low, largest), 1e-10f); }

    template <bool VALUES>
    __device__ __forceinline__ void encode(float largest) {
        for (int i = threadIdx.x; i < T * D; i += BALANCE_THREADS) {
            const float row = rows.best[i / D], column = columns.best[i % D];
            x[i] = VALUES ? __fdiv_rn(__fdiv_rn(x[i], column), row) : __fdiv_rn(__fdiv_rn(x[i], row), column);
        }
        __syncthreads();
        if (VALUES) {
            for (int r = threadIdx.x / 32; r < T; r += BALANCE_THREADS / 32) {
                float low = INFINITY, high = -INFINITY;
                for (int c = threadIdx.x % 32; c < D; c += 32) low = fminf(low, x[r * D + c]), high = fmaxf(high, x[r * D + c]);
                low = -warp_max(-low), high = warp_max(high);
                if (threadIdx.x % 32 == 0) settle(r, low, high, largest);
            }
        } else if (threadIdx.x < D) {
            float low = INFINITY, high = -INFINITY;
            for (int r = 0; r < T; r++) low = fminf(low, x[r * D + threadIdx.x]), high = fmaxf(high, x[r * D + threadIdx.x]);
            settle(threadIdx.x, low, high, largest);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < T * D; i += BALANCE_THREADS) {
            const int own = VALUES ? i / D : i % D;
            codes[i / D * PITCH + i % D] = int(rintf(fminf(__fdiv_rn(x[i] - min[own], scale[own]), largest)));
        }
        __syncthreads();
    }

    template <bool VALUES>
    __device__ __forceinline__ void record(const FillArgs& args, const FillRow& row, int record) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
#pragma unroll
        for (int i = 0; i < T * ROW_LANES / BALANCE_THREADS; i++) {
            const int r = i * (BALANCE_THREADS / ROW_LANES) + threadIdx.x / ROW_LANES;
            float own[D / 8];
            load_row<D>(own, args, row, VALUES, record * T + r);
            rotate_row<D>(own, args, row, VALUES, record * T + r);
#pragma unroll
            for (int k = 0; k < D / 8; k += 4) *reinterpret_cast<float4*>(x + r * D + number_at(k)) = make_float4(own[k], own[k + 1], own[k + 2], own[k + 3]);
        }
        __syncthreads();
        find<VALUES>();
        encode<VALUES>((1 << S::BITS) - 1);
        unsigned char* to = record_at(row, record, !VALUES && threadIdx.x == 0);
        for (int t = 0; t < L::TILES; t++) write_words<L, VALUES>(codes + t * TILE * PITCH, to + L::HEADER + t * L::TILE_BYTES, PITCH);
        auto half_at = [](unsigned char* p, int i) -> __half& { return reinterpret_cast<__half*>(p)[i]; };
        for (int r = threadIdx.x; r < T; r += BALANCE_THREADS) {
            unsigned char* tile = to + L::HEADER + r / TILE * L::TILE_BYTES;
            const int token = r % TILE;
            if (VALUES) {
                half_at(tile + L::V_SCALE, L::value_param_at(token, 0)) = __float2half_rn(rows.best[r] * scale[r]);
                half_at(tile + L::V_MIN, L::value_param_at(token, 0)) = __float2half_rn(rows.best[r] * min[r]);
            } else {
                half_at(tile + L::KT_SCALE, L::key_token_at(token)) = __float2half_rn(rows.best[r]);
            }
        }
        for (int c = threadIdx.x; c < D; c += BALANCE_THREADS) {
            if (VALUES) {
                half_at(to + L::V_FACTOR, L::factor_at(c)) = __float2half_rn(columns.best[c]);
            } else {
                half_at(to + L::K_SCALE, L::key_param_at(c)) = __float2half_rn(columns.best[c] * scale[c]);
                half_at(to + L::K_MIN, L::key_param_at(c)) = __float2half_rn(columns.best[c] * min[c]);
            }
        }
    }

    __device__ __forceinline__ void run(const FillArgs& args) {
        const FillRow& row = args.rows[blockIdx.y];
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
    constexpr int T = L::GROUP, D = L::D, MOST = T > D ? T : D;
    return 4 * T * D + 16 * (T + D) + 8 * MOST + 8 * BALANCE_THREADS + 8 + T * (D + 8);
}

// Grid: (the most of records of keys and of values that a row has, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_balanced(const FillArgs& args) {
    static_assert(sizeof(Balance<L>) == balance_shared<L>());
    extern __shared__ __align__(128) unsigned char balance[];
    reinterpret_cast<Balance<L>*>(balance)->run(args);
}

}  // namespace kvq

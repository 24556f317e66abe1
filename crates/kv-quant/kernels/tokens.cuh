// Quantizes and packs tiles of 32 tokens of schemes with parameters per token, with the arithmetic
// of src/quantize. 8 lanes process a token: they rotate it if the scheme does, and write its codes
// to shared memory. The codes are then packed into words.
#pragma once
#include <cuda_fp8.h>
#include <type_traits>
#include "args.cuh"
#include "levels.cuh"
#include "quantize.cuh"

namespace kvq {

constexpr int TOKEN_THREADS = 256;
constexpr int ROW_LANES = 8;        // lanes per row; element 8 i + j of lane l is number 64 i + 8 l + j
constexpr float LARGEST = 32752.f;  // largest magnitude that can be packed, half of f16's range

__device__ __forceinline__ int row_lane() { return threadIdx.x % ROW_LANES; }

// Returns the index in the row of a lane's k-th number.
__device__ __forceinline__ int number_at(int k) { return k / 8 * 64 + row_lane() * 8 + k % 8; }

template <class T, class Join>
__device__ __forceinline__ T over_row(T x, Join join) {
#pragma unroll
    for (int i = ROW_LANES / 2; i > 0; i /= 2) x = join(x, __shfl_xor_sync(FULL, x, i));
    return x;
}

__device__ __forceinline__ float row_max(float x) { return over_row(x, [](float a, float b) { return fmaxf(a, b); }); }

__device__ __forceinline__ float row_sum(float x) { return over_row(x, [](float a, float b) { return a + b; }); }

__device__ __forceinline__ float as_f16(float x) { return __half2float(__float2half_rn(x)); }

template <int N>
__device__ __forceinline__ float largest_of(const float (&x)[N]) {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, fabsf(x[i]));
    return top;
}

// The orthonormal Walsh-Hadamard transform of a row, as in hadamard.cuh.
template <int D>
__device__ __forceinline__ void hadamard_row(float (&x)[D / 8]) {
    auto within = [&](int step) {
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            if (!(i & step)) {
                float low = x[i], high = x[i + step];
                x[i] = low + high, x[i + step] = low - high;
            }
    };
    within(1), within(2), within(4);
#pragma unroll
    for (int step = 1; step < ROW_LANES; step *= 2) {
        const float sign = row_lane() & step ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(FULL, x[i], step));
    }
    if constexpr (D > 64) within(8);
    if constexpr (D > 128) within(16);
    const float norm = __frcp_rn(__fsqrt_rn(float(D)));
#pragma unroll
    for (int i = 0; i < D / 8; i++) x[i] *= norm;
}

// Loads a row of the call's tensors.
template <int D>
__device__ __forceinline__ void load_row(float (&x)[D / 8], const FillArgs& args, const FillRow& row, bool values, int entry) {
    const bool in_ring = entry < row.first_new;
    const void* start = in_ring ? (values ? row.ring_v : row.ring_k) : (values ? row.new_v : row.new_k);
    const __half* from = static_cast<const __half*>(start) + (in_ring ? (entry + row.shift) % args.ring * D : (entry - row.first_new) * args.stride);
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const uint4 loaded = *reinterpret_cast<const uint4*>(from + number_at(8 * i));
        const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t pair = pairs[j];
            float2 two = args.kind ? __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair)) : __half22float2(half2_of(pair));
            x[8 * i + 2 * j] = two.x, x[8 * i + 2 * j + 1] = two.y;
        }
    }
}

// Rotates a row if the scheme does, and reports numbers that are too large before or after the
// rotation.
template <int D>
__device__ __forceinline__ void rotate_row(float (&x)[D / 8], const FillArgs& args, const FillRow& row, bool values, int entry) {
    float sum = 0.f;  // NaN if any number is NaN
#pragma unroll
    for (int i = 0; i < D / 8; i++) sum += x[i];
    bool bad = !(largest_of(x) <= LARGEST) || sum != sum;
    if (args.rotated & (values ? ROTATED_VALUES : ROTATED_KEYS)) {
        hadamard_row<D>(x);
        bad |= !(largest_of(x) <= LARGEST);
    }
    if (bad) report(row, values, entry, number_at(0));
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

// Returns the address of a record. If the record is new, threads with `first` write it to the
// table.
__device__ __forceinline__ unsigned char* record_at(const FillRow& row, int record, bool first) {
    const bool fresh = record >= row.fresh_record;
    const unsigned long long at = fresh ? row.fresh[record - row.fresh_record] : row.table[record];
    if (fresh && first) row.table[record] = at;
    return reinterpret_cast<unsigned char*>(at);
}

// The codes, the scale and the minimum of a row.
template <class S, int D>
struct Row {
    unsigned char codes[D / 8];
    float scale = 0.f, min = 0.f;
    bool bad = false;

    __device__ __forceinline__ Row(const float (&x)[D / 8], bool f16_steps, float fixed) {
        if constexpr (S::FLOATS) floats(x, fixed);
        else if constexpr (S::CODES == Codes::LEVELS) levels(x);
        else if constexpr (S::CODES == Codes::SIGNED) whole_signed(x);
        else whole(x, f16_steps);
    }

    __device__ __forceinline__ void floats(const float (&x)[D / 8], float fixed) {
        constexpr bool E4 = S::CODES == Codes::E4M3;
        float divisor = fixed;  // 0 gives zeros for a row without a scale
        if (S::PARAMS != Params::NONE) divisor = scale = as_f16(__fdiv_rn(row_max(largest_of(x)), E4 ? 448.f : 57344.f));
        const float reciprocal = divisor == 0.f ? 0.f : __frcp_rn(divisor);
#pragma unroll
        for (int i = 0; i < D / 8; i += 2) {
            const float2 two = make_float2(divide(x[i], divisor, reciprocal), divide(x[i + 1], divisor, reciprocal));
            const uint32_t pair = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, E4 ? __NV_E4M3 : __NV_E5M2);
            codes[i] = pair & 0xff, codes[i + 1] = pair >> 8;
        }
    }

    // Returns the index of the positive level nearest to a magnitude, by binary search.
    static __device__ __forceinline__ int place_of(float y) {
        auto middle = [](int i) { return (positive(i - 1) + positive(i)) / 2.f; };
        if constexpr (S::BITS == 3) {
            const bool a = y >= middle(2), b = y >= (a ? middle(3) : middle(1));
            return 2 * a + b;
        } else {
            const bool a = y >= middle(4), b = y >= (a ? middle(6) : middle(2));
            const bool c = y >= (a ? (b ? middle(7) : middle(5)) : (b ? middle(3) : middle(1)));
            return 4 * a + 2 * b + c;
        }
    }
    static __device__ __forceinline__ float positive(int i) { return level_at<S::BITS>(S::BITS == 4 ? i : 4 + i); }

    __device__ __forceinline__ void levels(const float (&x)[D / 8]) {
        const float own = level_at<S::BITS>(S::BITS == 4 ? row_lane() : 4 + row_lane() % 4);  // this lane's level, which other lanes read by shuffles
        float sum = 0.f, held = 0.f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) sum = fmaf(x[i], x[i], sum);
        const float norm = __fsqrt_rn(row_sum(sum)), inverse = __fsqrt_rn(float(D)) / (norm + 1e-8f);
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const int place = place_of(fabsf(x[i]) * inverse);
            codes[i] = S::BITS == 4 ? place | (x[i] < 0.f) << 3 : x[i] < 0.f ? 3 - place : 4 + place;
            const float level = __shfl_sync(FULL, own, place, ROW_LANES);
            held = fmaf(level, level, held);
        }
        scale = fminf(as_f16(norm / __fsqrt_rn(row_sum(held))), 65504.f);
    }

    __device__ __forceinline__ void whole_signed(const float (&x)[D / 8]) {
        constexpr float HALF = 1 << (S::BITS - 1);
        const float top = row_max(largest_of(x));
        int first = INT_MAX;  // first number of the largest magnitude: twice its index plus its sign bit
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            if (fabsf(x[i]) == top) first = min_of(first, 2 * number_at(i) + (x[i] < 0.f));
        first = over_row(first, min_of);
        const float exact = (first % 2 ? -top : top) / -HALF, inverse = exact == 0.f ? 0.f : __frcp_rn(exact);
#pragma unroll
        for (int i = 0; i < D / 8; i++) codes[i] = int(fminf(__fadd_rn(__fmul_rn(x[i], inverse), HALF + 0.5f), 2.f * HALF - 1.f));
        scale = exact;
    }
    static __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

    __device__ __forceinline__ void whole(const float (&x)[D / 8], bool f16_steps) {
        constexpr float TOP = (1 << S::BITS) - 1;
        float low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const float y = f16_steps ? as_f16(x[i]) : x[i];
            low = fminf(low, y), high = fmaxf(high, y);
        }
        low = -row_max(-low), high = row_max(high);
        min = low;
        if (f16_steps) {
            bad = high - low >= 65520.f;
            scale = as_f16(__fdiv_rn(as_f16(high - low), TOP));
            const float reciprocal = scale == 0.f ? 0.f : __frcp_rn(scale);
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                const float y = as_f16(divide(as_f16(as_f16(x[i]) - low), scale, reciprocal));
                codes[i] = int(fminf(rintf(y), TOP));
            }
        } else {
            scale = fmaxf(__fdiv_rn(high - low, TOP), 1e-8f);
            const float reciprocal = __frcp_rn(scale);
#pragma unroll
            for (int i = 0; i < D / 8; i++) codes[i] = int(fminf(__fadd_rn(divide(x[i] - low, scale, reciprocal), 0.5f), TOP));
        }
    }
};

template <class L>
struct QuantizeTokens {
    static constexpr int D = L::D, PITCH = D + 8;
    static_assert(TILE * ROW_LANES == TOKEN_THREADS);

    template <bool VALUES>
    static __device__ __forceinline__ void tile(const FillArgs& args, const FillRow& row, int at) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
        constexpr int SCALE = VALUES ? L::V_SCALE : L::KT_SCALE, MIN = VALUES ? L::V_MIN : L::KT_MIN;
        constexpr bool SCALES = S::PARAMS != Params::NONE, MINS = SCALES && S::CODES == Codes::INTEGERS;
        __shared__ __align__(16) unsigned char codes[TILE * PITCH];
        __shared__ __half scales[TILE], mins[TILE];
        const int token = threadIdx.x / ROW_LANES, entry = at * TILE + token;
        float x[D / 8];
        load_row<D>(x, args, row, VALUES, entry);
        rotate_row<D>(x, args, row, VALUES, entry);
        const Row<S, D> own(x, args.f16_steps, VALUES ? args.value_scale : args.key_scale);
        if (own.bad) report(row, VALUES, entry, 0);
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            const unsigned char* c = own.codes + 8 * i;
            const uint2 eight = make_uint2(c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24, c[4] | c[5] << 8 | c[6] << 16 | c[7] << 24);
            *reinterpret_cast<uint2*>(codes + token * PITCH + number_at(8 * i)) = eight;
        }
        const int place = VALUES ? L::value_param_at(token, 0) : L::key_token_at(token);
        if (row_lane() == 0) scales[place] = __float2half_rn(own.scale * (1 << S::UP)), mins[place] = __float2half_rn(own.min);
        __syncthreads();
        unsigned char* to = record_at(row, at / L::TILES, !VALUES && at % L::TILES == 0 && threadIdx.x == 0) + L::HEADER + at % L::TILES * L::TILE_BYTES;
        write_words<L, VALUES>(codes, to, PITCH);
        if (threadIdx.x >= TILE) return;
        if (SCALES) reinterpret_cast<__half*>(to + SCALE)[threadIdx.x] = scales[threadIdx.x];
        if (MINS) reinterpret_cast<__half*>(to + MIN)[threadIdx.x] = mins[threadIdx.x];
    }

    static __device__ __forceinline__ void run(const FillArgs& args) {
        const FillRow& row = args.rows[blockIdx.y];
        const int block = blockIdx.x;
        if (blockIdx.z == 0) {
            if (block < row.key_records * L::TILES) tile<false>(args, row, row.key_record * L::TILES + block);
        } else if (block < row.value_tiles) {
            tile<true>(args, row, row.value_tile + block);
        }
    }
};

template <class L>
__host__ __device__ constexpr int token_threads() {
    return TOKEN_THREADS;
}

// Grid: (the largest number of tiles of keys or of values in a row, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_tokens(const FillArgs& args) { QuantizeTokens<L>::run(args); }

}  // namespace kvq

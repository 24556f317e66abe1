// Quantizes and packs tiles of 32 tokens of schemes whose parameters belong to tokens, in the arithmetic of src/quantize: a warp takes a token, rotates it
// if the scheme says so, and leaves its codes in shared memory, from where they go into words.
#pragma once
#include <cuda_fp8.h>
#include "args.cuh"
#include "hadamard.cuh"
#include "levels.cuh"
#include "quantize.cuh"

namespace kvq {

constexpr int TOKEN_THREADS = 256;
constexpr float LARGEST = 32752.f;  // that may be packed, half of f16's range

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, i));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(FULL, x, i);
    return x;
}

__device__ __forceinline__ float as_f16(float x) { return __half2float(__float2half_rn(x)); }

// A row of new numbers, of which a lane takes numbers 32 i + lane.
template <int D>
__device__ __forceinline__ void load_row(float (&x)[D / 32], const FillArgs& args, const FillRow& row, bool values, int entry) {
    const void* from = entry < row.first_new ? (values ? row.ring_v : row.ring_k) : (values ? row.new_v : row.new_k);
    const long long at = entry < row.first_new ? (entry + row.shift) % args.ring * D : (entry - row.first_new) * args.stride;
#pragma unroll
    for (int i = 0; i < D / 32; i++) x[i] = load_as_float(from, at + 32 * i + threadIdx.x % 32, args.kind);
}

// Rotates a row that is to be, and reports numbers that are too large before or after.
template <int D>
__device__ __forceinline__ void rotate_row(float (&x)[D / 32], const FillArgs& args, const FillRow& row, bool values, int entry) {
    const int lane = threadIdx.x % 32;
    bool bad = false;
#pragma unroll
    for (int i = 0; i < D / 32; i++) bad |= !(fabsf(x[i]) <= LARGEST);
    if (args.rotated & (values ? ROTATED_VALUES : ROTATED_KEYS)) {
        hadamard<D>(x, lane);
#pragma unroll
        for (int i = 0; i < D / 32; i++) bad |= !(fabsf(x[i]) <= LARGEST);
    }
    if (bad) report(row, values, entry, lane);
}

// The words of a tile's codes, of which `codes` has a row of PITCH bytes for each token.
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

// Where a record lies, which is put into the table by `first` threads if it is taken now.
__device__ __forceinline__ unsigned char* record_at(const FillRow& row, int record, bool first) {
    const bool fresh = record >= row.fresh_record;
    const unsigned long long at = fresh ? row.fresh[record - row.fresh_record] : row.table[record];
    if (fresh && first) row.table[record] = at;
    return reinterpret_cast<unsigned char*>(at);
}

// A row's codes, scale and minimum.
template <class S, int D>
struct Row {
    unsigned char codes[D / 32];
    float scale = 0.f, min = 0.f;
    bool bad = false;

    __device__ __forceinline__ Row(const float (&x)[D / 32], bool f16_steps, float fixed) {
        if constexpr (S::FLOATS) floats(x, fixed);
        else if constexpr (S::CODES == Codes::LEVELS) levels(x);
        else if constexpr (S::CODES == Codes::SIGNED) whole_signed(x);
        else whole(x, f16_steps);
    }

    __device__ __forceinline__ void floats(const float (&x)[D / 32], float fixed) {
        constexpr bool E4 = S::CODES == Codes::E4M3;
        float divisor = fixed;  // 0 makes zeros of a row without a scale
        if (S::PARAMS != Params::NONE) {
            float top = 0.f;
#pragma unroll
            for (int i = 0; i < D / 32; i++) top = fmaxf(top, fabsf(x[i]));
            scale = as_f16(__fdiv_rn(warp_max(top), E4 ? 448.f : 57344.f));
            divisor = scale;
        }
        const float reciprocal = divisor == 0.f ? 0.f : __frcp_rn(divisor);
#pragma unroll
        for (int i = 0; i < D / 32; i++) codes[i] = __nv_cvt_float_to_fp8(divide(x[i], divisor, reciprocal), __NV_SATFINITE, E4 ? __NV_E4M3 : __NV_E5M2);
    }

    __device__ __forceinline__ void levels(const float (&x)[D / 32]) {
        constexpr bool FOUR = S::BITS == 4;
        constexpr int COUNT = FOUR ? 8 : 4;
        const float root = __fsqrt_rn(float(D));
        float sum = 0.f, held = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) sum = fmaf(x[i], x[i], sum);
        const float norm = __fsqrt_rn(warp_sum(sum)), inverse = root / (norm + 1e-8f);
        auto positive = [](int i) { return level_at<S::BITS>(FOUR ? i : 4 + i); };
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const float y = fabsf(x[i]) * inverse;
            int place = 0;
            float top = positive(0);
#pragma unroll
            for (int j = 1; j < COUNT; j++)
                if (y >= (positive(j - 1) + positive(j)) / 2.f) place = j, top = positive(j);
            codes[i] = FOUR ? place | (x[i] < 0.f) << 3 : x[i] < 0.f ? 3 - place : 4 + place;
            held = fmaf(top, top, held);
        }
        scale = fminf(as_f16(norm / __fsqrt_rn(warp_sum(held))), 65504.f);
    }

    __device__ __forceinline__ void whole_signed(const float (&x)[D / 32]) {
        constexpr float HALF = 1 << (S::BITS - 1);
        float top = 0.f, farthest = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; i++) top = fmaxf(top, fabsf(x[i]));
        top = warp_max(top);
#pragma unroll
        for (int i = D / 32 - 1; i >= 0; i--) {  // The first of several is taken.
            const unsigned found = __ballot_sync(FULL, fabsf(x[i]) == top);
            const float own = __shfl_sync(FULL, x[i], __ffs(found | 1u << 31) - 1);
            if (found) farthest = own;
        }
        const float exact = farthest / -HALF, inverse = exact == 0.f ? 0.f : __frcp_rn(exact);
#pragma unroll
        for (int i = 0; i < D / 32; i++) codes[i] = int(fminf(__fadd_rn(__fmul_rn(x[i], inverse), HALF + 0.5f), 2.f * HALF - 1.f));
        scale = exact;
    }

    __device__ __forceinline__ void whole(const float (&x)[D / 32], bool f16_steps) {
        constexpr float TOP = (1 << S::BITS) - 1;
        float low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const float y = f16_steps ? as_f16(x[i]) : x[i];
            low = fminf(low, y), high = fmaxf(high, y);
        }
        low = -warp_max(-low), high = warp_max(high);
        min = low;
        if (f16_steps) {
            bad = high - low >= 65520.f;
            scale = as_f16(__fdiv_rn(as_f16(high - low), TOP));
            const float reciprocal = scale == 0.f ? 0.f : __frcp_rn(scale);
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                const float y = as_f16(divide(as_f16(as_f16(x[i]) - low), scale, reciprocal));
                codes[i] = int(fminf(rintf(y), TOP));
            }
        } else {
            scale = fmaxf(__fdiv_rn(high - low, TOP), 1e-8f);
            const float reciprocal = __frcp_rn(scale);
#pragma unroll
            for (int i = 0; i < D / 32; i++) codes[i] = int(fminf(__fadd_rn(divide(x[i] - low, scale, reciprocal), 0.5f), TOP));
        }
    }
};

template <class L>
struct QuantizeTokens {
    static constexpr int D = L::D, PITCH = D + 8, EACH = TILE / (TOKEN_THREADS / 32);

    template <bool VALUES>
    static __device__ __forceinline__ void tile(const FillArgs& args, const FillRow& row, int at) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
        constexpr int SCALE = VALUES ? L::V_SCALE : L::KT_SCALE, MIN = VALUES ? L::V_MIN : L::KT_MIN;
        constexpr bool SCALES = S::PARAMS != Params::NONE, MINS = SCALES && S::CODES == Codes::INTEGERS;
        __shared__ unsigned char codes[TILE * PITCH];
        __shared__ __half scales[TILE], mins[TILE];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = at * TILE;
        float x[EACH][D / 32];
#pragma unroll
        for (int e = 0; e < EACH; e++) load_row<D>(x[e], args, row, VALUES, first + warp * EACH + e);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int token = warp * EACH + e;
            rotate_row<D>(x[e], args, row, VALUES, first + token);
            const Row<S, D> own(x[e], args.f16_steps, VALUES ? args.value_scale : args.key_scale);
            if (own.bad) report(row, VALUES, first + token, 0);
#pragma unroll
            for (int i = 0; i < D / 32; i++) codes[token * PITCH + 32 * i + lane] = own.codes[i];
            const int place = VALUES ? L::value_param_at(token, 0) : L::key_token_at(token);
            if (lane == 0) scales[place] = __float2half_rn(own.scale * (1 << S::UP)), mins[place] = __float2half_rn(own.min);
        }
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

// Grid: (the most of tiles of keys and of values that a row has, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_tokens(const FillArgs& args) { QuantizeTokens<L>::run(args); }

}  // namespace kvq

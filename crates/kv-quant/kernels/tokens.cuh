// Quantizes and packs tiles of 32 tokens of schemes with parameters per token, with the arithmetic
// of src/quantize. D / 32 lanes process a token: they rotate it if the scheme does, and write its
// codes to shared memory, as bytes in the order of a word's bytes. The codes are then packed into
// words.
#pragma once
#include <cuda_fp8.h>
#include <type_traits>
#include <utility>
#include "args.cuh"
#include "levels.cuh"
#include "quantize.cuh"

namespace kvq {

constexpr float LARGEST = 32752.f;  // largest magnitude that can be packed, half of f16's range

// Rows of D numbers in registers: LANES lanes have 32 numbers of a row each. Number 8 i + j of lane
// l is number 8 LANES i + 8 l + j of the row.
template <int D>
struct Rows {
    static constexpr int NUMBERS = 32, LANES = D / NUMBERS;
    static_assert(LANES == 2 || LANES == 4 || LANES == 8);

    static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }

    // Returns the index in the row of a lane's k-th number.
    static __device__ __forceinline__ int number_at(int k) { return k / 8 * (8 * LANES) + lane() * 8 + k % 8; }

    template <class T, class Combine>
    static __device__ __forceinline__ T over_row(T x, Combine combine) {
#pragma unroll
        for (int i = LANES / 2; i > 0; i /= 2) x = combine(x, __shfl_xor_sync(FULL, x, i));
        return x;
    }

    static __device__ __forceinline__ float max(float x) { return over_row(x, [](float a, float b) { return fmaxf(a, b); }); }
    static __device__ __forceinline__ float min(float x) { return over_row(x, [](float a, float b) { return fminf(a, b); }); }
    static __device__ __forceinline__ float sum(float x) { return over_row(x, [](float a, float b) { return a + b; }); }

    // The orthonormal Walsh-Hadamard transform, as in hadamard.cuh.
    static __device__ __forceinline__ void hadamard(float (&x)[NUMBERS]) {
        auto within = [&](int step) {
#pragma unroll
            for (int i = 0; i < NUMBERS; i++)
                if (!(i & step)) {
                    const float low = x[i], high = x[i + step];
                    x[i] = low + high, x[i + step] = low - high;
                }
        };
        within(1), within(2), within(4);
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            const float sign = lane() & step ? -1.f : 1.f;
#pragma unroll
            for (int i = 0; i < NUMBERS; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(FULL, x[i], step));
        }
        within(8), within(16);
        const float norm = __frcp_rn(__fsqrt_rn(float(D)));
#pragma unroll
        for (int i = 0; i < NUMBERS; i++) x[i] *= norm;
    }

    // Loads a row of the call's tensors or of a ring. Returns its largest magnitude in this lane,
    // or NaN if a number is NaN.
    static __device__ __forceinline__ float load(float (&x)[NUMBERS], const FillArgs& args, const FillRow& row, bool values, int entry) {
        const __half* from;
        if (entry < row.first_new) from = static_cast<const __half*>(values ? row.ring_v : row.ring_k) + (long long)((entry + row.shift) % args.ring) * D;
        else from = static_cast<const __half*>(values ? row.new_v : row.new_k) + (entry - row.first_new) * args.stride;
        uint4 loaded[NUMBERS / 8];
#pragma unroll
        for (int i = 0; i < NUMBERS / 8; i++) loaded[i] = *reinterpret_cast<const uint4*>(from + number_at(8 * i));
        return args.kind ? widen<__nv_bfloat162>(x, loaded) : widen<__half2>(x, loaded);
    }

  private:
    static __device__ __forceinline__ float2 floats(__half2 x) { return __half22float2(x); }
    static __device__ __forceinline__ float2 floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }

    template <class Pair>
    static __device__ __forceinline__ float widen(float (&x)[NUMBERS], const uint4 (&loaded)[NUMBERS / 8]) {
        Pair largest;
#pragma unroll
        for (int i = 0; i < NUMBERS / 2; i++) {
            const uint4& eight = loaded[i / 4];
            const uint32_t word = i % 4 == 0 ? eight.x : i % 4 == 1 ? eight.y : i % 4 == 2 ? eight.z : eight.w;
            const Pair pair = *reinterpret_cast<const Pair*>(&word);
            const float2 two = floats(pair);
            x[2 * i] = two.x, x[2 * i + 1] = two.y;
            largest = i ? __hmax2_nan(largest, __habs2(pair)) : __habs2(pair);
        }
        const float2 two = floats(largest);
        return two.x != two.x ? two.x : two.y != two.y ? two.y : fmaxf(two.x, two.y);
    }
};

__device__ __forceinline__ float as_f16(float x) { return __half2float(__float2half_rn(x)); }

template <int N>
__device__ __forceinline__ float largest_of(const float (&x)[N]) {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, fabsf(x[i]));
    return top;
}

// Returns a word whose low byte is the integer part of x, or the nearest integer. x is from 0 to
// 255. Between 2^23 and 2^24 f32 numbers are integers, so the addition rounds.
__device__ __forceinline__ uint32_t integer_part(float x) { return __float_as_uint(__fadd_rz(x, 8388608.f)); }
__device__ __forceinline__ uint32_t nearest_integer(float x) { return __float_as_uint(__fadd_rn(x, 8388608.f)); }

// Returns the low bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return permute(permute(a, b, 0x0040), permute(c, d, 0x0040), 0x5410); }

// Returns the address of a record. If the record is new, threads with `first` write it to the
// table.
__device__ __forceinline__ unsigned char* record_at(const FillRow& row, int record, bool first) {
    const bool is_new = record >= row.first_new_record;
    const unsigned long long at = is_new ? row.new_records[record - row.first_new_record] : row.table[record];
    if (is_new && first) row.table[record] = at;
    return reinterpret_cast<unsigned char*>(at);
}

// The codes of a tile, as words of four bytes in the order of `Packing`'s: for keys, the four
// columns of a token that share a word; for values, the four tokens of a channel that do.
template <int D, bool VALUES>
struct TileCodes {
    // Multiples of 32 words plus 4 or 8, to avoid bank conflicts of `pack`.
    static constexpr int ROWS = VALUES ? 8 : TILE, PITCH = VALUES ? D + 8 : D / 4 + 4;
    uint32_t words[ROWS * PITCH];

    // Returns the token of this thread, of 32 LANES. Four tokens whose values share words are in
    // lanes LANES apart; `place` is the token's byte.
    static __device__ __forceinline__ int place() { return threadIdx.x / Rows<D>::LANES % 4; }
    static __device__ __forceinline__ int row() { return threadIdx.x / Rows<D>::LANES / (VALUES ? 4 : 1) % ROWS; }
    static __device__ __forceinline__ int token() { return VALUES ? row() / 4 * 16 + row() % 4 * 2 + place() / 2 + place() % 2 * 8 : row(); }

    // Writes eight codes of the token, from channel `channel` on: `low` has the first four. All
    // lanes of a warp call it.
    __device__ __forceinline__ void write(uint32_t low, uint32_t high, int channel) {
        if constexpr (VALUES) {
            constexpr int STEP = Rows<D>::LANES;
            const int p = place();
            // Four channels of two tokens, then two channels of four tokens.
            uint32_t kept = p & 2 ? high : low, got = __shfl_xor_sync(FULL, p & 2 ? low : high, 2 * STEP);
            const uint32_t mine = permute(kept, got, p & 1 ? 0x7632 : 0x5410), sent = permute(kept, got, p & 1 ? 0x5410 : 0x7632);
            got = __shfl_xor_sync(FULL, sent, STEP);
            // Bytes 0 and 2 are of tokens p and p ^ 2 (`mine`), or p ^ 1 and p ^ 3 (`got`).
            const uint32_t order = p == 0 ? 0x6240 : p == 1 ? 0x2604 : p == 2 ? 0x4062 : 0x0426;
            *reinterpret_cast<uint2*>(words + row() * PITCH + channel + 2 * p) = make_uint2(permute(mine, got, order), permute(mine, got, order + 0x1111));
        } else {
            // The neighbor has the columns 8 apart.
            const bool odd = threadIdx.x % 2;
            const uint32_t kept = odd ? high : low, got = __shfl_xor_sync(FULL, odd ? low : high, 1);
            *reinterpret_cast<uint2*>(words + row() * PITCH + channel / 4) = make_uint2(permute(kept, got, odd ? 0x1504 : 0x5140), permute(kept, got, odd ? 0x3726 : 0x7362));
        }
    }

    // Packs the codes into a tile's words, as thread `thread` of `threads`.
    template <int BITS>
    __device__ __forceinline__ void pack(unsigned char* to, int thread, int threads) const {
        using P = Packing<BITS>;
        for (int item = thread; item < D / 16 / P::UNITS * LANES; item += threads) {
            const int chunk = item / LANES, lane = item % LANES, g = lane / 4, t = lane % 4;
            uint32_t packed[P::UNITS * P::WORDS];
#pragma unroll
            for (int u = 0; u < P::UNITS; u++) {
                const int unit = chunk * P::UNITS + u;
#pragma unroll
                for (int w = 0; w < P::WORDS; w++) {
                    uint32_t word = 0;
#pragma unroll
                    for (int i = 0; i < P::ROWS; i++) {
                        const int row = (w * P::ROWS + i) * 8 + g;
                        const int at = VALUES ? (unit / (D / 32) * 4 + t) * PITCH + unit % (D / 32) * 32 + row : row * PITCH + unit * 4 + t;
                        word |= words[at] << (i * P::FIELD);
                    }
                    packed[u * P::WORDS + w] = word;
                }
            }
            P::store(packed, to, chunk, lane);
        }
    }
};

// The codes, the scale and the minimum of a row.
template <class S, int D>
struct Row {
    using R = Rows<D>;
    static constexpr int N = R::NUMBERS;
    uint32_t codes[N / 4];  // four codes each
    float scale = 0.f, min = 0.f;
    float largest;  // largest magnitude in this lane
    bool bad = false;

    __device__ __forceinline__ Row(const float (&x)[N], bool f16_steps, float fixed) {
        if constexpr (S::FLOATS) floats(x, fixed);
        else if constexpr (S::CODES == Codes::LEVELS) levels(x);
        else if constexpr (S::CODES == Codes::SIGNED) whole_signed(x);
        else whole(x, f16_steps);
    }

    // Sets all codes; the low byte of `code(i)` is number i's.
    template <class Code>
    __device__ __forceinline__ void encode(Code code) {
#pragma unroll
        for (int i = 0; i < N; i += 4) codes[i / 4] = low_bytes(code(i), code(i + 1), code(i + 2), code(i + 3));
    }

    __device__ __forceinline__ void floats(const float (&x)[N], float fixed) {
        constexpr bool E4 = S::CODES == Codes::E4M3;
        largest = largest_of(x);
        float divisor = fixed;  // 0 gives zeros for a row without a scale
        if (S::PARAMS != Params::NONE) divisor = scale = as_f16(__fdiv_rn(R::max(largest), E4 ? 448.f : 57344.f));
        const float reciprocal = divisor == 0.f ? 0.f : __frcp_rn(divisor);
        auto pair = [&](int i) -> uint32_t {
            const float2 two = make_float2(divide(x[i], divisor, reciprocal), divide(x[i + 1], divisor, reciprocal));
            return __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, E4 ? __NV_E4M3 : __NV_E5M2);
        };
#pragma unroll
        for (int i = 0; i < N; i += 4) codes[i / 4] = permute(pair(i), pair(i + 2), 0x5410);
    }

    static __host__ __device__ constexpr float positive(int i) { return level_at<S::BITS>(S::BITS == 4 ? i : 4 + i); }
    template <int I>
    static constexpr float POSITIVE = positive(I);
    template <int I>
    static constexpr float MIDDLE = (positive(I - 1) + positive(I)) / 2.f;
    // An array in registers cannot be indexed at run time.
    template <int... I>
    static __device__ __forceinline__ float positive_at(int i, std::integer_sequence<int, I...>) {
        float x = 0.f;
        ((x = i == I ? POSITIVE<I> : x), ...);
        return x;
    }

    // Returns the index of the positive level nearest to a magnitude, by binary search.
    static __device__ __forceinline__ int place_of(float y) {
        if constexpr (S::BITS == 3) {
            const bool a = y >= MIDDLE<2>, b = y >= (a ? MIDDLE<3> : MIDDLE<1>);
            return 2 * a + b;
        } else {
            const bool a = y >= MIDDLE<4>, b = y >= (a ? MIDDLE<6> : MIDDLE<2>);
            const bool c = y >= (a ? (b ? MIDDLE<7> : MIDDLE<5>) : (b ? MIDDLE<3> : MIDDLE<1>));
            return 4 * a + 2 * b + c;
        }
    }

    __device__ __forceinline__ void levels(const float (&x)[N]) {
        constexpr int LEVELS = S::BITS == 4 ? 8 : 4;
        // This lane's level, which other lanes read by shuffles.
        const float own = positive_at(threadIdx.x % LEVELS, std::make_integer_sequence<int, LEVELS>());
        float sum = 0.f, held = 0.f;
        largest = largest_of(x);
#pragma unroll
        for (int i = 0; i < N; i++) sum = fmaf(x[i], x[i], sum);
        const float norm = __fsqrt_rn(R::sum(sum)), inverse = __fsqrt_rn(float(D)) / (norm + 1e-8f);
        encode([&](int i) -> uint32_t {
            const int place = place_of(fabsf(x[i]) * inverse);
            const float level = __shfl_sync(FULL, own, place, LEVELS);
            held = fmaf(level, level, held);
            return S::BITS == 4 ? place | (x[i] < 0.f) << 3 : x[i] < 0.f ? 3 - place : 4 + place;
        });
        scale = fminf(as_f16(norm / __fsqrt_rn(R::sum(held))), 65504.f);
    }

    __device__ __forceinline__ void extremes(const float (&x)[N], float& low, float& high) {
        low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int i = 0; i < N; i++) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
        largest = fmaxf(high, -low);
        low = R::min(low), high = R::max(high);
    }

    __device__ __forceinline__ void whole_signed(const float (&x)[N]) {
        constexpr float HALF = 1 << (S::BITS - 1);
        float low, high;
        extremes(x, low, high);
        const float top = fmaxf(high, -low);
        bool negative = -low > high;
        const bool tied = high == -low && top > 0.f;
        // The first number of the largest magnitude determines the sign.
        if (__any_sync(FULL, tied)) {
            int first = INT_MAX;       // twice its index plus its sign bit
#pragma unroll
            for (int i = 0; i < N; i++)
                if (fabsf(x[i]) == top) first = min_of(first, 2 * R::number_at(i) + (x[i] < 0.f));
            first = R::over_row(first, min_of);
            if (tied) negative = first % 2;
        }
        const float exact = (negative ? -top : top) / -HALF, inverse = exact == 0.f ? 0.f : __frcp_rn(exact);
        encode([&](int i) { return integer_part(fminf(__fadd_rn(__fmul_rn(x[i], inverse), HALF + 0.5f), 2.f * HALF - 1.f)); });
        scale = exact;
    }
    static __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

    __device__ __forceinline__ void whole(const float (&x)[N], bool f16_steps) {
        constexpr float TOP = (1 << S::BITS) - 1;
        float low, high;
        extremes(x, low, high);
        if (f16_steps) {
            min = low = as_f16(low), high = as_f16(high);
            bad = high - low >= 65520.f;
            scale = as_f16(__fdiv_rn(as_f16(high - low), TOP));
            const float reciprocal = scale == 0.f ? 0.f : __frcp_rn(scale);
            encode([&](int i) { return nearest_integer(fminf(as_f16(divide(as_f16(as_f16(x[i]) - low), scale, reciprocal)), TOP)); });
        } else {
            min = low;
            scale = fmaxf(__fdiv_rn(high - low, TOP), 1e-8f);
            const float reciprocal = __frcp_rn(scale);
            encode([&](int i) { return integer_part(fminf(__fadd_rn(divide(x[i] - low, scale, reciprocal), 0.5f), TOP)); });
        }
    }
};

template <class L>
__host__ __device__ constexpr int token_threads() {
    return TILE * Rows<L::D>::LANES;
}

// The number of thread blocks that a multiprocessor should be able to run: 1,024 threads, which
// have 64 registers each.
template <class L>
__host__ __device__ constexpr int token_blocks() {
    return 1024 / token_threads<L>();
}

template <class L>
struct QuantizeTokens {
    static constexpr int D = L::D;
    using R = Rows<D>;

    template <bool VALUES>
    static __device__ __forceinline__ void tile(const FillArgs& args, const FillRow& row, int at) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
        constexpr int SCALE = VALUES ? L::V_SCALE : L::KT_SCALE, MIN = VALUES ? L::V_MIN : L::KT_MIN;
        constexpr bool SCALES = S::PARAMS != Params::NONE, MINS = SCALES && S::CODES == Codes::INTEGERS;
        __shared__ __align__(16) TileCodes<D, VALUES> codes;
        __shared__ __half scales[TILE], mins[TILE];
        const int token = codes.token(), entry = at * TILE + token;
        float x[R::NUMBERS];
        bool bad = !(R::load(x, args, row, VALUES, entry) <= LARGEST);
        if (args.rotated & (VALUES ? ROTATED_VALUES : ROTATED_KEYS)) R::hadamard(x);
        const Row<S, D> own(x, args.f16_steps, VALUES ? args.value_scale : args.key_scale);
        bad |= !(own.largest <= LARGEST) || own.bad;
        if (bad) report(row, VALUES, entry, R::number_at(0));
#pragma unroll
        for (int i = 0; i < R::NUMBERS / 8; i++) codes.write(own.codes[2 * i], own.codes[2 * i + 1], R::number_at(8 * i));
        const int place = VALUES ? L::value_param_at(token, 0) : L::key_token_at(token);
        if (R::lane() == 0) scales[place] = __float2half_rn(own.scale * (1 << S::UP)), mins[place] = __float2half_rn(own.min);
        __syncthreads();
        unsigned char* to = record_at(row, at / L::TILES, !VALUES && at % L::TILES == 0 && threadIdx.x == 0) + L::HEADER + at % L::TILES * L::TILE_BYTES;
        codes.template pack<S::BITS>(to + (VALUES ? L::V_CODES : L::K_CODES), threadIdx.x, token_threads<L>());
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

// Grid: (the largest number of tiles of keys or of values in a row, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_tokens(const FillArgs& args) { QuantizeTokens<L>::run(args); }

}  // namespace kvq

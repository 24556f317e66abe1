// Quantizes and packs tiles of 32 tokens of schemes with parameters per token, with the arithmetic
// of src/quantize. A warp processes a tile: it copies the tile's numbers to shared memory and loads
// them as fragments of the tensor cores. So each lane has the numbers whose codes it writes, and
// the tensor cores compute four of the rotation's steps.
#pragma once
#include <cuda_fp8.h>
#include <type_traits>
#include "args.cuh"
#include "levels.cuh"
#include "quantize.cuh"

namespace kvq {

constexpr float LARGEST = 32752.f;  // largest magnitude that can be packed, half of f16's range

__device__ __forceinline__ float as_f16(float x) { return __half2float(__float2half_rn(x)); }

// Returns a word whose low byte is the integer part of x, or the nearest integer. x is from 0 to
// 255. Between 2^23 and 2^24 f32 numbers are integers, so the addition rounds.
__device__ __forceinline__ uint32_t integer_part(float x) { return __float_as_uint(__fadd_rz(x, 8388608.f)); }

// Returns the address of a record. If the record is new, threads with `first` write it to the
// table.
__device__ __forceinline__ unsigned char* record_at(const FillArgs& args, const HeadRow& row, int record, bool first) {
    const bool is_new = record >= row.first_new_record;
    const unsigned long long at = is_new ? args.new_records[row.new_records + record - row.first_new_record] : row.table[record];
    if (is_new && first) row.table[record] = at;
    return reinterpret_cast<unsigned char*>(at);
}

// A tile of f16 or bf16 numbers in shared memory, a row per token. The 16-byte pieces of a row are
// permuted to avoid bank conflicts.
template <int D>
struct alignas(512) Source {
    static constexpr int PIECES = D / 8, TOKENS = 32 / PIECES;  // 16-byte pieces of a token, tokens of a copy
    unsigned char numbers[TILE * D * 2];

    // Starts copying the tokens from `entry` on, as two groups of copies of 16 tokens.
    __device__ __forceinline__ void copy(const FillArgs& args, const HeadRow& row, bool values, int entry, int lane) {
        const int piece = lane % PIECES, first = lane / PIECES;
        const long long stride = values ? args.v_token : args.k_token;
        const __half* from = (values ? row.new_v : row.new_k) + (entry + first - row.first_new) * stride + piece * 8;
        const __half* ring = static_cast<const __half*>(values ? row.ring_v : row.ring_k) + piece * 8;
        const bool in_ring = entry < row.first_new;  // at least the first
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (!in_ring) {
#pragma unroll
                for (int i = 0; i < PIECES / 2; i++, from += TOKENS * stride) copy_piece(half * 16 + i * TOKENS + first, piece, from);
            } else {
#pragma unroll 1
                for (int i = 0; i < PIECES / 2; i++, from += TOKENS * stride) {
                    const int token = half * 16 + i * TOKENS + first, at = entry + token;
                    copy_piece(token, piece, at < row.first_new ? ring + (long long)((at + row.shift) % args.ring) * D : from);
                }
            }
            copy_commit();
        }
    }

    __device__ __forceinline__ void copy_piece(int token, int piece, const __half* from) {
        copy16(shared_address(numbers + (token * PIECES + (piece ^ token % 8)) * 16), from);
    }
};

// Numbers of two tokens in each lane: of 16 tokens of keys, or of 8 tokens of values. They are
// COUNT fragments of the tensor cores' results. With lane = 4 g + t, a fragment of
//
//     keys    2 j + n  has the tokens g (numbers 0, 1) and g + 8 (2, 3), and the channels
//                      16 j + 8 n + 2 t (0, 2) and + 1 (1, 3)
//     values  j        has the tokens 2 t (0, 2) and 2 t + 1 (1, 3), and the channels 16 j + g
//                      (0, 1) and + 8 (2, 3)
template <int D, bool VALUES>
struct Numbers {
    static constexpr int COUNT = VALUES ? D / 16 : D / 8;
    float x[COUNT][4];

    // Returns which of the lane's two tokens has number c of a fragment.
    static __host__ __device__ constexpr int token_of(int c) { return VALUES ? c % 2 : c / 2; }

    static __device__ __forceinline__ int channel_of(int i, int c) {
        const int lane = threadIdx.x;
        return VALUES ? 16 * i + lane / 4 + c / 2 * 8 : 8 * i + lane % 4 * 2 + c % 2;
    }

    // Combines numbers of each of the two tokens over all lanes that have the token.
    template <class T, class Combine>
    static __device__ __forceinline__ void over_token(T (&both)[2], Combine combine) {
#pragma unroll
        for (int i = VALUES ? 16 : 2; i >= (VALUES ? 4 : 1); i /= 2)
#pragma unroll
            for (int e = 0; e < 2; e++) both[e] = combine(both[e], __shfl_xor_sync(FULL, both[e], i));
    }

    // Loads the tokens from `token` of the tile on; rotated numbers are not yet multiplied by
    // 1 / sqrt(D). Returns the largest magnitude in this lane before the rotation, or NaN if a
    // number is NaN.
    template <class Pair>
    __device__ __forceinline__ float load(const Source<D>& source, int token, bool rotated, int lane) {
        const int row = token + (VALUES ? 0 : lane / 8 % 2 * 8) + lane % 8, piece = VALUES ? lane / 8 : lane / 16;
        const uint32_t at = shared_address(source.numbers + row * D * 2 + (piece ^ lane % 8) * 16);
        Pair largest = pair_of<Pair>(0);
        uint32_t loaded[COUNT][2];
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            uint32_t(&a)[2] = loaded[i], (&b)[2] = loaded[i + 1];
            if (VALUES && !rotated) load_matrices<true>(a[0], a[1], b[0], b[1], at ^ i * 32);
            else load_matrices<false>(a[0], a[1], b[0], b[1], at ^ i * (VALUES ? 32 : 16));
#pragma unroll
            for (int r = 0; r < 2; r++) largest = __hmax2_nan(__hmax2_nan(largest, __habs2(pair_of<Pair>(a[r]))), __habs2(pair_of<Pair>(b[r])));
        }
        if (rotated) rotate<Pair>(loaded, lane);
        else
#pragma unroll
            for (int i = 0; i < COUNT; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float2 two = floats(pair_of<Pair>(loaded[i][r]));
                    x[i][2 * r] = two.x, x[i][2 * r + 1] = two.y;
                }
        const float2 two = floats(largest);
        return two.x != two.x ? two.x : two.y != two.y ? two.y : fmaxf(two.x, two.y);
    }

    template <class Function>
    __device__ __forceinline__ void each(Function function) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) function(x[i][c], i, c);
    }

  private:
    static __device__ __forceinline__ float2 floats(__half2 x) { return __half22float2(x); }
    static __device__ __forceinline__ float2 floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }

    template <class Pair>
    static __device__ __forceinline__ Pair pair_of(uint32_t x) { return *reinterpret_cast<const Pair*>(&x); }

    // The Walsh-Hadamard transform. Products with a matrix of 16 rows are the steps 1 to 8; larger
    // steps are between fragments.
    template <class Pair>
    __device__ __forceinline__ void rotate(const uint32_t (&loaded)[COUNT][2], int lane) {
        constexpr bool BF16 = std::is_same_v<Pair, __nv_bfloat162>;
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = __popc(2 * t & g) % 2, high = __popc((2 * t + 1) & g) % 2;
        const uint32_t plus = (BF16 ? 0x3f803f80 : 0x3c003c00) | low << 15 | high << 31, minus = plus ^ 0x80008000;
        each([&](float, int i, int c) { x[i][c] = 0.f; });
        if constexpr (VALUES) {
            const uint32_t matrix[4] = {plus, plus, plus, minus};
#pragma unroll
            for (int i = 0; i < COUNT; i++) mma<Pair>(x[i], matrix, loaded[i][0], loaded[i][1]);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i += 2) {
                const uint32_t rows[4] = {loaded[i][0], loaded[i][1], loaded[i + 1][0], loaded[i + 1][1]};
                mma<Pair>(x[i], rows, plus, plus), mma<Pair>(x[i + 1], rows, plus, minus);
            }
        }
#pragma unroll
        for (int step = VALUES ? 1 : 2; step < COUNT; step *= 2)
            each([&](float, int i, int c) {
                if (i & step) return;
                const float a = x[i][c], b = x[i + step][c];
                x[i][c] = a + b, x[i + step][c] = a - b;
            });
    }
};

// The codes and parameters of two tokens in each lane.
template <class S, int D, bool VALUES>
struct Row {
    using N = Numbers<D, VALUES>;
    using P = Packing<S::BITS>;
    static constexpr int COUNT = N::COUNT, PARTS = P::FIELD / 4;

    // A fragment's codes at their positions in a word, or in two words if P::ROWS is 1. A word has
    // the codes of two fragments, eight bits apart.
    uint32_t parts[COUNT][PARTS];
    float scale[2] = {}, min[2] = {};
    bool bad;

    // `unit` times the numbers are those to quantize.
    __device__ __forceinline__ Row(const N& n, float unit, bool f16_steps, float fixed) {
        if constexpr (S::FLOATS) floats(n, unit, fixed);
        else if constexpr (S::CODES == Codes::LEVELS) levels(n, unit);
        else if constexpr (S::CODES == Codes::SIGNED) whole_signed(n, unit);
        else if (f16_steps) whole_in_f16(n, unit);
        else whole(n, unit);
    }

    // Sets the codes of a fragment: words with number 0 or 2 in the lower half, and with number 1 or
    // 3 in the upper half.
    __device__ __forceinline__ void set(int i, uint32_t first, uint32_t second) {
        if constexpr (PARTS == 1) parts[i][0] = (second << 4) + first;
        else parts[i][0] = first, parts[i][1] = second;
    }

    // Sets all codes; the lower half of the word `code(x, c)` is number c's.
    template <class Code>
    __device__ __forceinline__ void encode(const N& n, Code code) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t of[4];
#pragma unroll
            for (int c = 0; c < 4; c++) of[c] = code(n.x[i][c], N::token_of(c));
            set(i, permute(of[0], of[1], 0x5410), permute(of[2], of[3], 0x5410));
        }
    }

    static __device__ __forceinline__ void largest(const N& n, float (&top)[2]) {
        top[0] = top[1] = 0.f;
        n.each([&](float x, int, int c) { top[N::token_of(c)] = fmaxf(top[N::token_of(c)], fabsf(x)); });
    }

    __device__ __forceinline__ void floats(const N& n, float unit, float fixed) {
        constexpr bool E4 = S::CODES == Codes::E4M3;
        float top[2], divisor[2], reciprocal[2];
        largest(n, top);
        bad = !(fmaxf(top[0], top[1]) * unit <= LARGEST);
        if (S::PARAMS != Params::NONE) N::over_token(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (int e = 0; e < 2; e++) {
            divisor[e] = fixed;  // 0 gives zeros for a row without a scale
            if (S::PARAMS != Params::NONE) divisor[e] = scale[e] = as_f16(__fdiv_rn(top[e] * unit, E4 ? 448.f : 57344.f));
            reciprocal[e] = divisor[e] == 0.f ? 0.f : __frcp_rn(divisor[e]);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t pairs[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int a = N::token_of(2 * r), b = N::token_of(2 * r + 1);
                const float2 two = make_float2(divide(n.x[i][2 * r] * unit, divisor[a], reciprocal[a]), divide(n.x[i][2 * r + 1] * unit, divisor[b], reciprocal[b]));
                pairs[r] = permute(__nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, E4 ? __NV_E4M3 : __NV_E5M2), 0, 0x4140);
            }
            set(i, pairs[0], pairs[1]);
        }
    }

    // Returns the index of the nearest level in the low bits. A polynomial replaces the search: it
    // is an integer at each middle between two levels, and it increases between them. So the index
    // is its value, rounded down, plus half the number of levels. `factor` divides the number by the
    // standard deviation and by 6 (4 bits) or 5; beyond that the outermost level is the nearest.
    static __device__ __forceinline__ uint32_t place_of(float x, float factor) {
        constexpr bool FOUR = S::BITS == 4;
        const float u = __saturatef(fmaf(x, factor, 0.5f)) - 0.5f, v = u * u;
        float sum;
        if constexpr (FOUR) {
            sum = fmaf(v, -602.0375366210938f, 202.78228759765625f);
            sum = fmaf(v, sum, 62.737335205078125f), sum = fmaf(v, sum, -109.81818389892578f), sum = fmaf(v, sum, 81.27457427978516f);
            sum = fmaf(v, sum, -46.868106842041016f), sum = fmaf(v, sum, 23.31692886352539f);
        } else {
            sum = fmaf(v, 14.043428421020508f, -14.407890319824219f), sum = fmaf(v, sum, 10.136565208435059f);
        }
        return __float_as_uint(__fmaf_rd(u, sum, 12582912.f + (FOUR ? 8 : 4)));
    }

    // Returns byte `byte` of the squares of the magnitudes `first` to `first` + 3, in units of 2^-21.
    static __host__ __device__ constexpr uint32_t square_bytes(int first, int byte) {
        uint32_t bytes = 0;
        for (int i = 0; i < 4; i++) {
            const double x = level_at<S::BITS>(first + i);
            bytes |= (uint32_t(x * x * (1 << 21) + 0.5) >> (8 * byte) & 0xff) << (8 * i);
        }
        return bytes;
    }

    __device__ __forceinline__ void levels(const N& n, float unit) {
        static_assert(!VALUES && PARTS == 1);
        constexpr float SPAN = S::BITS == 4 ? 6.f : 5.f;
        float sums[2] = {}, factor[2];
        n.each([&](float x, int, int c) { sums[N::token_of(c)] = fmaf(x, x, sums[N::token_of(c)]); });
        N::over_token(sums, [](float a, float b) { return a + b; });
        bad = false;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            scale[e] = __fsqrt_rn(sums[e]) * unit;
            factor[e] = unit * __fdiv_rn(__fsqrt_rn(float(D)) / SPAN, scale[e] + 1e-8f);
            if (!(scale[e] <= LARGEST)) bad = true;
        }
        if (bad) {  // The norm exceeds the limit; the numbers need not.
            float top[2];
            largest(n, top);
            bad = !(fmaxf(top[0], top[1]) * unit <= LARGEST) || sums[0] != sums[0] || sums[1] != sums[1];
        }
        encode(n, [&](float x, int e) { return place_of(x, factor[e]); });
        uint32_t squares[2][3] = {};
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            uint32_t word = (parts[i + 1][0] << 8) + parts[i][0];
            if constexpr (S::BITS == 4) {
                // From the index of a level to its magnitude's index and its sign.
                const uint32_t negative = (word ^= 0x88888888u) & 0x88888888u;
                word ^= negative - (negative >> 3);
            }
            parts[i][0] = word, parts[i + 1][0] = 0;
            const uint32_t places = word & 0x77777777u;
#pragma unroll
            for (int byte = 0; byte < 3; byte++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint32_t found = permute(square_bytes(0, byte), square_bytes(4, byte), places >> 16 * half);
                    squares[0][byte] = __dp4a(found, 0x00010001u, squares[0][byte]), squares[1][byte] = __dp4a(found, 0x01000100u, squares[1][byte]);
                }
        }
        uint32_t held[2];
#pragma unroll
        for (int e = 0; e < 2; e++) held[e] = squares[e][0] + (squares[e][1] << 8) + (squares[e][2] << 16);
        N::over_token(held, [](uint32_t a, uint32_t b) { return a + b; });
#pragma unroll
        for (int e = 0; e < 2; e++) scale[e] = fminf(as_f16(scale[e] / __fsqrt_rn(float(held[e]) * (1.f / (1 << 21)))), 65504.f);
    }

    // Computes the extremes of each token's numbers.
    __device__ __forceinline__ void extremes(const N& n, float unit, float (&low)[2], float (&high)[2]) {
        low[0] = low[1] = INFINITY, high[0] = high[1] = -INFINITY;
        n.each([&](float x, int, int c) { low[N::token_of(c)] = fminf(low[N::token_of(c)], x), high[N::token_of(c)] = fmaxf(high[N::token_of(c)], x); });
        N::over_token(low, [](float a, float b) { return fminf(a, b); }), N::over_token(high, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (int e = 0; e < 2; e++) low[e] *= unit, high[e] *= unit;
        bad = !(fmaxf(fmaxf(high[0], -low[0]), fmaxf(high[1], -low[1])) <= LARGEST);
    }

    __device__ __forceinline__ void whole_signed(const N& n, float unit) {
        constexpr float HALF = 1 << (S::BITS - 1);
        float low[2], high[2], factor[2];
        bool negative[2], tied = false;
        extremes(n, unit, low, high);
#pragma unroll
        for (int e = 0; e < 2; e++) negative[e] = -low[e] > high[e], tied |= high[e] == -low[e] && high[e] > 0.f;
        // The first number of the largest magnitude determines the sign.
        if (__any_sync(FULL, tied)) {
            int first[2] = {INT_MAX, INT_MAX};  // twice its channel plus its sign bit
            n.each([&](float x, int i, int c) {
                const int e = N::token_of(c);
                if (fabsf(x * unit) == high[e]) first[e] = min_of(first[e], 2 * N::channel_of(i, c) + (x < 0.f));
            });
            N::over_token(first, min_of);
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (high[e] == -low[e]) negative[e] = first[e] % 2;
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            scale[e] = (negative[e] ? low[e] : high[e]) / -HALF;
            factor[e] = scale[e] == 0.f ? 0.f : unit * __frcp_rn(scale[e]);
        }
        encode(n, [&](float x, int e) { return integer_part(fminf(__fadd_rn(__fmul_rn(x, factor[e]), HALF + 0.5f), 2.f * HALF - 1.f)); });
    }
    static __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

    __device__ __forceinline__ void whole(const N& n, float unit) {
        constexpr float TOP = (1 << S::BITS) - 1;
        float high[2], reciprocal[2];
        extremes(n, unit, min, high);
#pragma unroll
        for (int e = 0; e < 2; e++) scale[e] = fmaxf(__fdiv_rn(high[e] - min[e], TOP), 1e-8f), reciprocal[e] = __frcp_rn(scale[e]);
        // A quotient exceeds TOP by at most its rounding.
        encode(n, [&](float x, int e) { return integer_part(__fadd_rn(divide(x * unit - min[e], scale[e], reciprocal[e]), 0.5f)); });
    }

    __device__ __forceinline__ void whole_in_f16(const N& n, float unit) {
        constexpr float TOP = (1 << S::BITS) - 1;
        __half2 x[COUNT][2], low[2], high[2];
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                x[i][r] = __floats2half2_rn(n.x[i][2 * r] * unit, n.x[i][2 * r + 1] * unit);
                low[r] = i ? __hmin2_nan(low[r], x[i][r]) : x[i][r], high[r] = i ? __hmax2_nan(high[r], x[i][r]) : x[i][r];
            }
        auto least = [](__half2 a, __half2 b) { return __hmin2_nan(a, b); };
        auto most = [](__half2 a, __half2 b) { return __hmax2_nan(a, b); };
        // Both pairs of a fragment's values are of the lane's two tokens; a pair of keys is of one.
        if constexpr (VALUES) low[0] = low[1] = least(low[0], low[1]), high[0] = high[1] = most(high[0], high[1]);
        else
#pragma unroll
            for (int e = 0; e < 2; e++) low[e] = least(low[e], __lowhigh2highlow(low[e])), high[e] = most(high[e], __lowhigh2highlow(high[e]));
        N::over_token(low, least), N::over_token(high, most);
        float2 step[2], reciprocal[2];
        bad = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 range = __half22float2(__hsub2(high[r], low[r])), top = __half22float2(most(high[r], __hneg2(low[r])));
            bad |= !(range.x < INFINITY) || !(range.y < INFINITY) || !(top.x <= LARGEST) || !(top.y <= LARGEST);
            step[r] = make_float2(as_f16(__fdiv_rn(range.x, TOP)), as_f16(__fdiv_rn(range.y, TOP)));
            reciprocal[r] = make_float2(step[r].x > 0.f ? __frcp_rn(step[r].x) : 0.f, step[r].y > 0.f ? __frcp_rn(step[r].y) : 0.f);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float2 minimum = __half22float2(low[e]);
            scale[e] = VALUES && e ? step[e].y : step[e].x, min[e] = VALUES && e ? minimum.y : minimum.x;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t pairs[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 y = __half22float2(__hsub2(x[i][r], low[r]));
                // A product with the reciprocal of an f16 number, rounded to f16, is the quotient.
                const __half2 q = __hmin2(__floats2half2_rn(y.x * reciprocal[r].x, y.y * reciprocal[r].y), __float2half2_rn(TOP));
                pairs[r] = bits(__hadd2(q, __float2half2_rn(1024.f))) & 0x00ff00ffu;
            }
            set(i, pairs[0], pairs[1]);
        }
    }
};

constexpr int TOKEN_THREADS = 32;

// The number of thread blocks that a multiprocessor should be able to run. A lane has up to 64
// numbers of keys and their codes, or 128 at D = 256.
template <class L>
__host__ __device__ constexpr int token_blocks() {
    return L::D > 128 ? 8 : 16;
}

template <class L>
struct QuantizeTokens {
    static constexpr int D = L::D;

    template <bool VALUES>
    static __device__ __forceinline__ void tile(const FillArgs& args, const HeadRow& row, int at, Source<D>& source) {
        using S = std::conditional_t<VALUES, typename L::Values, typename L::Keys>;
        using R = Row<S, D, VALUES>;
        using P = Packing<S::BITS>;
        constexpr int SCALE = VALUES ? L::V_SCALE : L::KT_SCALE, MIN = VALUES ? L::V_MIN : L::KT_MIN;
        constexpr int WORDS = D / 16 * R::PARTS;
        constexpr bool SCALES = S::PARAMS != Params::NONE, MINS = SCALES && S::CODES == Codes::INTEGERS;
        const int lane = threadIdx.x;
        const bool rotated = args.rotated & (VALUES ? ROTATED_VALUES : ROTATED_KEYS);
        const float unit = rotated ? __frcp_rn(__fsqrt_rn(float(D))) : 1.f;
        source.copy(args, row, VALUES, at * TILE, lane);
        unsigned char* to = record_at(args, row, at / L::TILES, !VALUES && at % L::TILES == 0 && lane == 0) + L::HEADER + at % L::TILES * L::TILE_BYTES;
        // Words and parameters of 16 tokens each. The loops over tokens are not unrolled, so that
        // the code stays small.
        uint32_t words[2][WORDS];
        __half2 scales[2][2], mins[2][2];
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            if (half) copy_wait<0>();
            else copy_wait<1>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[0][i] = words[1][i];
#pragma unroll
            for (int i = 0; i < 2; i++) scales[0][i] = scales[1][i], mins[0][i] = mins[1][i];
#pragma unroll 1
            for (int lot = 0; lot < (VALUES ? 2 : 1); lot++) {
                const int token = half * 16 + lot * 8;
                Numbers<D, VALUES> numbers;
                const float most = args.kind ? numbers.template load<__nv_bfloat162>(source, token, rotated, lane) : numbers.template load<__half2>(source, token, rotated, lane);
                const R own(numbers, unit, args.f16_steps, VALUES ? args.value_scale : args.key_scale);
                if (own.bad || !(most <= LARGEST)) report(args, row, VALUES, at * TILE + token + (VALUES ? lane % 4 * 2 : lane / 4), 0);
                scales[1][0] = scales[1][1], mins[1][0] = mins[1][1];
                scales[1][1] = __floats2half2_rn(own.scale[0] * (1 << S::UP), own.scale[1] * (1 << S::UP)), mins[1][1] = __floats2half2_rn(own.min[0], own.min[1]);
#pragma unroll
                for (int i = 0; i < WORDS; i++) {
                    const int j = i / R::PARTS, r = i % R::PARTS;
                    if constexpr (VALUES) words[1][i] = lot ? (own.parts[j][r] << 8) + words[1][i] : own.parts[j][r];
                    else words[1][i] = (own.parts[2 * j + 1][r] << 8) + own.parts[2 * j][r];
                }
            }
        }
#pragma unroll
        for (int chunk = 0; chunk < D / 16 / P::UNITS; chunk++) {
            uint32_t packed[P::UNITS * P::WORDS];
#pragma unroll
            for (int i = 0; i < P::UNITS * P::WORDS; i++) {
                const int unit = chunk * P::UNITS + i / P::WORDS, word = i % P::WORDS;
                if constexpr (VALUES) packed[i] = words[unit / (D / 32)][unit % (D / 32) * P::WORDS + word];
                else packed[i] = words[word / R::PARTS][unit * R::PARTS + word % R::PARTS];
            }
            P::store(packed, to + (VALUES ? L::V_CODES : L::K_CODES), chunk, lane);
        }
        // A lane has the parameters of four tokens whose places are adjacent; those of values twice.
        if (VALUES ? lane >= 4 : lane % 4) return;
#pragma unroll
        for (int half = 0; half < (VALUES ? 2 : 1); half++) {
            const int place = VALUES ? L::value_param_at(16 * half + 2 * lane, 0) : L::key_token_at(lane / 4);
            auto put = [&](int offset, const __half2 (&x)[2][2]) {
                *reinterpret_cast<uint2*>(to + offset + 2 * place) = make_uint2(bits(VALUES ? x[half][0] : x[0][1]), bits(x[VALUES ? half : 1][1]));
            };
            if (SCALES) put(SCALE, scales);
            if (MINS) put(MIN, mins);
        }
    }

    static __device__ __forceinline__ void run(const FillArgs& args) {
        __shared__ Source<D> source;
        const HeadRow row(args, blockIdx.y);
        const int block = blockIdx.x;
        if (blockIdx.z == 0) {
            if (block < row.key_records * L::TILES) tile<false>(args, row, row.key_record * L::TILES + block, source);
        } else if (block < row.value_tiles) {
            tile<true>(args, row, row.value_tile + block, source);
        }
    }
};

// Grid: (the largest number of tiles of keys or of values in a row, rows, 2).
template <class L>
__device__ __forceinline__ void quantize_tokens(const FillArgs& args) { QuantizeTokens<L>::run(args); }

}  // namespace kvq

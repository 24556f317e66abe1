// RWKV-7's recurrence (Peng and others, arXiv 2503.14456) for prompts, in chunks of 16 tokens and matrix products.
//
// Of a head, with c(t) the removal key, b(t) what is added, S the state [keys][values] before the chunk, W(t) the product of the chunk's decays up to
// token t, M = W(7), and the rows
//
//     R(t) = r(t) o W(t) / M,   C(t) = c(t) o W(t - 1) / M,   K(s) = k(s) o M / W(s),   B(s) = b(s) o M / W(s),
//
// what the removal keys find, u(t) = -c(t)' S(t - 1), solves a triangular system, and with it all else is products:
//
//     U = -(I + C B')^-1 (C M S + (C K') V)   with C B' and C K' for s < t only
//     Y = R M S + (R K') V + (R B') U         for s <= t
//     S <- W(15) / M o (M S + K' V + B' U).
//
// RWKV-7 keeps at least e^-e^(-1/2) = 0.545 of a number at each token, so that W(t) / M lies within 2^-7 and 2^7, and f16 holds all rows, for bf16 inputs too.
//
// A block takes VALUES of a head's values through all tokens. Makers, warps that each prepare every WKV7_MAKERS-th chunk, do all but the lines
// above; two users go through all chunks, half of the columns of S each in f32 registers. Makers hold tokens x keys as fragments: a lane has tokens
// row and row + 8 (row = lane / 4), and of the keys those that lie side by side in memory: tile j of eight keys, columns pair and pair + 1, are the keys
// 8 (lane % 4) + 2 j and the next in the first half of the head (j < 4), 24 more in the other. It is the same order wherever keys are summed over.
#pragma once
#include "args.cuh"
#include "mma.cuh"

namespace hybrid {

constexpr int WKV7_CHUNK = 16, WKV7_DIM = 64, WKV7_TILES = WKV7_DIM / 8;
constexpr int WKV7_MAKERS = 10, WKV7_USERS = 2, WKV7_THREADS = 32 * (WKV7_MAKERS + WKV7_USERS);
// Keys, state and all that comes of them are held divided by this, which leaves f16 room for states up to a million.
constexpr float WKV7_SCALE = 16.f;

template <class T, int VALUES>
struct Wkv7Chunk {
    uint4 r[WKV7_TILES / 2][32], c[WKV7_TILES / 2][32];         // Lanes' fragments B of R' and C', 16 keys each
    uint32_t k[2 * WKV7_TILES][32], b[2 * WKV7_TILES][32];      // 8 x 8 blocks: [tile, half of the tokens][token][keys]
    uint32_t kr[4][32], br[4][32], kc[4][32], solve[4][32];     // K R', B R', K C' and -(I + B C')^-1, blocks [half of t, half of s][s][t]
    uint4 v[VALUES / 16][32];                               // 8 x 8 blocks of T: [half of the tokens, half of the values][token][values]
    float2 before[4][WKV7_TILES + 2], after[4][WKV7_TILES + 2];  // M and W(15) / M of [lane % 4][tile]
};

// A chunk's inputs as they come, in 16 bytes, which lie in their rows in an order (at ^ turn) such that no two lanes that read at once meet in a bank.
struct Wkv7Raw {
    uint4 key[WKV7_CHUNK][8], a[WKV7_CHUNK][8], r[WKV7_CHUNK][8], w[WKV7_CHUNK][8];
};
__device__ __forceinline__ int turn_of_rows(int t) { return t % 2 * 4; }
__device__ __forceinline__ int turn_of_pairs(int t) { return t / 2 % 4; }
__device__ __forceinline__ int turn_of_values(int eight) { return eight * 2 % 8 + eight / 4; }

// What is the same for all chunks, two f16 in a word, of [lane % 4][half of the tiles].
struct Wkv7Weights {
    uint4 rate_bias[4][2], key_slope[4][2], key_base[4][2], removal[4][2], own[4][2];

    // By one warp.
    __device__ void fill(const Wkv7& p, int lane) {
        const int j = lane / 4, key = blockIdx.y * WKV7_DIM + j / 4 * 32 + lane % 4 * 8 + j % 4 * 2;
        auto of = [&](const float* x) { return *(const float2*)(x + key); };
        auto put = [&](uint4(&to)[4][2], float x, float y) { ((uint32_t*)&to[lane % 4][0])[j] = packed<__half>(x, y); };
        const float2 bias = of(p.rate_bias), rate = of(p.key_rate), scale = of(p.removal_scale), share = of(p.own_scale);
        // rate = (1 + tanh(x / 2)) / 2, and the key is multiplied with 1 + (rate - 1) key_rate.
        constexpr float ONE = 1 / WKV7_SCALE;
        put(rate_bias, 0.5f * bias.x, 0.5f * bias.y), put(removal, scale.x, scale.y), put(own, share.x, share.y);
        put(key_slope, 0.5f * ONE * rate.x, 0.5f * ONE * rate.y), put(key_base, ONE * (1 - 0.5f * rate.x), ONE * (1 - 0.5f * rate.y));
    }
};

template <class T, int VALUES>
struct Wkv7Shared {
    Wkv7Chunk<T, VALUES> chunks[WKV7_MAKERS];
    Wkv7Raw raw[WKV7_MAKERS];
    Wkv7Weights weights;
    uint64_t full[WKV7_MAKERS], empty[WKV7_MAKERS];
};

// Two numbers of T as f16.
template <class T>
__device__ __forceinline__ uint32_t as_f16(uint32_t x) {
    if (std::is_same<T, __half>::value) return x;
    const float2 y = unpacked<T>(x);
    return packed<__half>(y.x, y.y);
}
constexpr uint32_t ONES = 0x3c003c00, HALVES = 0x38003800;

// Two tiles of the rows: fragments B of R' and C', A of K and B.
struct Wkv7Rows {
    uint32_t r[4], c[4], k[4], b[4];
};

template <class T, int VALUES>
struct Wkv7Maker {
    static constexpr int EIGHTS = VALUES / 8;
    const Wkv7& p;
    Wkv7Chunk<T, VALUES>& chunk;
    Wkv7Raw& raw;
    const Wkv7Weights& weights;
    const int lane, row, quarter, head;
    const long long start;
    uint64_t *full, *empty;
    const T *key_at, *a_at, *r_at, *w_at, *v_at;  // What this lane copies first of its next chunk
    float decay[WKV7_TILES];
    uint32_t sums[4];  // Logarithms of decays to those of W(t) / M; in row 7, where that is 1, to 1 / M.

    __device__ Wkv7Maker(const Wkv7& p, Wkv7Shared<T, VALUES>& shared, int warp)
        : p(p), chunk(shared.chunks[warp]), raw(shared.raw[warp]), weights(shared.weights), lane(threadIdx.x % 32), row(lane / 4), quarter(lane % 4),
          head(blockIdx.y * WKV7_DIM), start((long long)blockIdx.z * p.tokens), full(&shared.full[warp]), empty(&shared.empty[warp]) {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) {
            // Logarithms are made as fragments B: there a lane has column row of each tile.
            decay[j] = -LOG2_E * p.decay[head + j / 4 * 32 + row / 2 * 8 + j % 4 * 2 + row % 2];
        }
        const long long token = start + warp * WKV7_CHUNK + lane / 8;
        const int at = head + lane % 8 * 8;
        key_at = (const T*)p.key + token * p.key_row + at, a_at = (const T*)p.a + token * p.a_row + at;
        r_at = (const T*)p.r + token * p.r_row + at, w_at = (const T*)p.w + token * p.w_row + at;
        v_at = (const T*)p.v + (start + warp * WKV7_CHUNK + lane / EIGHTS) * p.v_row + head + blockIdx.x * VALUES + lane % EIGHTS * 8;
        chunk.kr[1][lane] = chunk.br[1][lane] = chunk.kc[1][lane] = chunk.solve[1][lane] = 0;
        const int s = 2 * quarter;
        auto early = [&](int s) { return row == 7 || s > row ? -1.f : 0.f; };
        auto late = [&](int s) { return s <= row ? 1.f : 0.f; };
        sums[0] = packed<__half>(early(s), early(s + 1)), sums[1] = sums[2] = none(), sums[3] = packed<__half>(late(s), late(s + 1));
    }
    // Zero, in a register that is kept.
    __device__ uint32_t none() {
        uint32_t x;
        asm volatile("mov.b32 %0, 0;" : "=r"(x));
        return x;
    }

    // Of the next of this warp's chunks, of which so many tokens are left. Those beyond come as zeros.
    template <class F>
    __device__ void load(const T*& from, int stride, uint4 (&to)[WKV7_CHUNK][8], int left, F turn) {
        const T* at = from;
#pragma unroll
        for (int t = 0; t < WKV7_CHUNK; t += 4, at += 4 * stride) {
            const int token = lane / 8 + t;
            copy16(&to[token][lane % 8 ^ turn(token)], at, token < left);
        }
        from += WKV7_MAKERS * WKV7_CHUNK * (long long)stride;
    }
    __device__ void load_first(int left) {
        load(w_at, p.w_row, raw.w, left, turn_of_pairs);
        load(key_at, p.key_row, raw.key, left, turn_of_rows);
        end_copies();
    }
    __device__ void load_second(int left) {
        load(a_at, p.a_row, raw.a, left, turn_of_rows);
        load(r_at, p.r_row, raw.r, left, turn_of_rows);
        end_copies();
    }
    __device__ void load_values(int left) {
        const T* at = v_at;
        constexpr int STEP = 32 / EIGHTS;
        const int eight = lane % EIGHTS;
#pragma unroll
        for (int t = 0; t < WKV7_CHUNK; t += STEP, at += STEP * p.v_row) {
            const int token = lane / EIGHTS + t;
            copy16(&chunk.v[eight / 2][(token / 8 * 2 + eight % 2) * 8 + (token % 8 ^ turn_of_values(eight))], at, token < left);
        }
        v_at += WKV7_MAKERS * WKV7_CHUNK * (long long)p.v_row;
        end_copies();
    }

    // Exponents of W(t) / M.
    __device__ void sum_decays(int left, float (&g)[WKV7_TILES][4]) {
        constexpr float UNIT = -1.f / (0.6065306597126334f * LOG2_E);
        const uint32_t select = row % 2 ? 0x7632 : 0x5410;
        // Tokens beyond the last change nothing.
        auto mask = [&](int t) { return (t < left ? 0xffffu : 0) | (t + 1 < left ? 0xffff0000u : 0); };
        const uint32_t there[2] = {mask(2 * quarter), mask(2 * quarter + 8)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[4][4];  // Of tokens t and t + 1, of 8 later
#pragma unroll
            for (int i = 0; i < 4; i++) four(raw.w[2 * quarter + i % 2 + i / 2 * 8][4 * half + row / 2 ^ quarter], x[i]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float bias = decay[4 * half + j];
                uint32_t logs[2];
#pragma unroll
                for (int late = 0; late < 2; late++) {
                    const float2 w = unpacked<T>(__byte_perm(x[2 * late][j], x[2 * late + 1][j], select));
                    auto log = [&](float w) { return inverse(fmaf(exp2_of(fmaf(w, -LOG2_E, bias)), UNIT, UNIT)); };
                    logs[late] = packed<__half>(log(w.x), log(w.y)) & there[late];
                }
                float(&to)[4] = g[4 * half + j];
                to[0] = to[1] = to[2] = to[3] = 0.f;
                multiply<__half>(to, sums, logs[0], logs[1]);
            }
        }
    }

    static __device__ void four(const uint4& x, uint32_t (&to)[4]) { to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w; }
    // Four tiles of token row + 8 late.
    __device__ void words(const uint4 (&from)[WKV7_CHUNK][8], int half, int late, uint32_t (&to)[4]) {
        four(from[row + 8 * late][4 * half + quarter ^ turn_of_rows(row)], to);
    }

    // Of two lanes' diagonal places of x x', tokens row and row + 8, to all lanes of the row.
    __device__ float2 diagonal(const float (&early)[4], const float (&late)[4]) {
        const float x = row % 2 ? early[1] : early[0], y = row % 2 ? late[3] : late[2];
        const int from = (lane & 28) + row / 2;
        return make_float2(__shfl_sync(~0u, x, from), __shfl_sync(~0u, y, from));
    }

    // Unit removal keys, and keys as f16.
    __device__ void remove(uint32_t (&key)[WKV7_TILES][2], uint32_t (&c)[WKV7_TILES][2]) {
        float early[4] = {}, late[4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[2][4];
            words(raw.key, half, 0, x[0]), words(raw.key, half, 1, x[1]);
            uint32_t scales[4];
            four(weights.removal[quarter][half], scales);
#pragma unroll
            for (int j = 4 * half; j < 4 * half + 4; j += 2) {
                // The same twice, since as fragments A and B they lie in other registers.
                uint32_t a[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int at = j % 4 + e / 2;
                    const uint32_t k = key[j + e / 2][e % 2] = as_f16<T>(x[e % 2][at]);
                    a[e] = times_plus(k, scales[at], 0), c[j + e / 2][e % 2] = times(k, scales[at]);
                }
                multiply<__half>(early, a, c[j][0], c[j + 1][0]);
                multiply<__half>(late, a, c[j][1], c[j + 1][1]);
            }
        }
        const float2 squares = diagonal(early, late);
        auto scale_of = [](float square) { return fminf(rsqrtf(fmaxf(square, 1e-24f)), 65504.f); };
        const float x = scale_of(squares.x), y = scale_of(squares.y);
        const uint32_t scale[2] = {packed<__half>(x, x), packed<__half>(y, y)};
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) c[j][0] = times(c[j][0], scale[0]), c[j][1] = times(c[j][1], scale[1]);
    }

    // Half of the head as it came, of tokens row and row + 8, and its weights.
    struct Half {
        uint32_t a[2][4], r[2][4], rate_bias[4], key_slope[4], key_base[4], own[4];
    };
    __device__ void read(int half, Half& to) {
#pragma unroll
        for (int late = 0; late < 2; late++) words(raw.a, half, late, to.a[late]), words(raw.r, half, late, to.r[late]);
        four(weights.rate_bias[quarter][half], to.rate_bias), four(weights.key_slope[quarter][half], to.key_slope);
        four(weights.key_base[quarter][half], to.key_base), four(weights.own[quarter][half], to.own);
    }

    // Rows of tile j, the i-th of two.
    __device__ void make_tile(int j, int i, const Half& from, const float (&g)[4], const uint32_t (&key)[2], const uint32_t (&unit)[2], Wkv7Rows& to) {
        float2 down[2] = {{exp2_of(-g[0]), exp2_of(-g[1])}, {exp2_of(-g[2]), exp2_of(-g[3])}};
        const float2 up[2] = {{exp2_of(g[0]), exp2_of(g[1])}, {exp2_of(g[2]), exp2_of(g[3])}};
        if (row == 7) chunk.before[quarter][j] = down[0], chunk.after[quarter][j] = up[1];
        uint32_t ups[2] = {packed<__half>(up[0].x, up[0].y), packed<__half>(up[1].x, up[1].y)};
        // Of the token before: in the row above. For row 0, row 7 has 1 / M first.
        uint32_t before[2] = {__shfl_sync(~0u, ups[0], lane + 28 & 31), __shfl_sync(~0u, ups[1], lane + 28 & 31)};
        if (row == 0) before[1] = ONES;
        if (row == 7) ups[0] = ONES, down[0] = make_float2(1.f, 1.f);
        const int at = j % 4;
        const float2 bias = unpacked<__half>(from.rate_bias[at]), slope = unpacked<__half>(from.key_slope[at]), base = unpacked<__half>(from.key_base[at]);
#pragma unroll
        for (int late = 0; late < 2; late++) {
            const float2 x = unpacked<T>(from.a[late][at]), keys = unpacked<__half>(key[late]), by = down[late];
            const float2 rate = {tanh_of(fmaf(x.x, 0.5f, bias.x)), tanh_of(fmaf(x.y, 0.5f, bias.y))};  // Twice the rate, less 1
            const uint32_t rates = times_plus(packed<__half>(rate.x, rate.y), HALVES, HALVES);
            to.k[2 * i + late] = packed<__half>(keys.x * fmaf(rate.x, slope.x, base.x) * by.x, keys.y * fmaf(rate.y, slope.y, base.y) * by.y);
            to.b[2 * i + late] = times(times(unit[late], rates), packed<__half>(by.x, by.y));
            to.c[i + 2 * late] = times(unit[late], before[late]);
            to.r[i + 2 * late] = times(as_f16<T>(from.r[late][at]), ups[late]);
            chunk.k[2 * j + late][lane] = to.k[2 * i + late], chunk.b[2 * j + late][lane] = to.b[2 * i + late];
        }
    }

    // Products of the rows: of K and B with eight tokens of R, eight more, and the same of C. own: K times R o own_scale.
    struct Products {
        float k[4][4], b[4][4], own[2][4];
    };
    __device__ void multiply_rows(const Wkv7Rows& x, const uint32_t* own, bool own_wanted, Products& to) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint32_t r[2] = {x.r[2 * n], x.r[2 * n + 1]}, c[2] = {x.c[2 * n], x.c[2 * n + 1]};
            multiply<__half>(to.k[n], x.k, r[0], r[1]), multiply<__half>(to.b[n], x.b, r[0], r[1]);
            multiply<__half>(to.k[2 + n], x.k, c[0], c[1]), multiply<__half>(to.b[2 + n], x.b, c[0], c[1]);
            if (own_wanted) multiply<__half>(to.own[n], x.k, times(r[0], own[0]), times(r[1], own[1]));
        }
    }

    __device__ void make(int index, int parity) {
        const int left = p.tokens - index * WKV7_CHUNK, next = left - WKV7_MAKERS * WKV7_CHUNK;
        const bool own_wanted = p.own && blockIdx.x == 0;
        await_copies<1>();
        __syncwarp();
        float g[WKV7_TILES][4];
        uint32_t key[WKV7_TILES][2], unit[WKV7_TILES][2];
        sum_decays(left, g);
        remove(key, unit);
        __syncwarp();  // All have read what comes again.
        next > 0 ? load_first(next) : end_copies();
        await_barrier(empty, parity);
        load_values(left);
        await_copies<2>();
        __syncwarp();
        Products products = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Half inputs;
            read(half, inputs);
#pragma unroll
            for (int step = 2 * half; step < 2 * half + 2; step++) {
                Wkv7Rows rows;
#pragma unroll
                for (int i = 0; i < 2; i++) make_tile(2 * step + i, i, inputs, g[2 * step + i], key[2 * step + i], unit[2 * step + i], rows);
                chunk.r[step][lane] = make_uint4(rows.r[0], rows.r[1], rows.r[2], rows.r[3]);
                chunk.c[step][lane] = make_uint4(rows.c[0], rows.c[1], rows.c[2], rows.c[3]);
                multiply_rows(rows, &inputs.own[2 * (step % 2)], own_wanted, products);
            }
        }
        __syncwarp();
        next > 0 ? load_second(next) : end_copies();
        if (own_wanted) store_own(index, left, diagonal(products.own[0], products.own[1]));
        finish(products);
        await_copies<1>();  // The values
        __syncwarp();
    }
    __device__ void store_own(int index, int left, float2 sums) {
        float* to = p.own + (start + index * WKV7_CHUNK + row) * p.heads + blockIdx.y;
        if (quarter == 0 && row < left) *to = WKV7_SCALE * sums.x;
        if (quarter == 0 && row + 8 < left) to[8 * p.heads] = WKV7_SCALE * sums.y;
    }

    __device__ void make_all() {
        int parity = 1, index = threadIdx.x / 32;
        const int left = p.tokens - index * WKV7_CHUNK;
        if (left > 0) load_first(left), load_second(left);
        for (; index * WKV7_CHUNK < p.tokens; index += WKV7_MAKERS, parity ^= 1) {
            make(index, parity);
            if (lane == 0) arrive_at(full);
        }
    }

    // Nothing below the diagonal of eight rows and columns, and nothing on it unless asked for.
    __device__ uint32_t cut(float& x, float& y, bool diagonal) {
        const int t = 2 * quarter, s = diagonal ? row : row + 1;
        if (t < s) x = 0.f;
        if (t + 1 < s) y = 0.f;
        return packed<__half>(x, y);
    }
    // Accumulators of 16 tokens s times eight t each, s <= t or s < t.
    __device__ void store(uint32_t (&to)[4][32], float (&early)[4], float (&late)[4], bool diagonal) {
        to[0][lane] = cut(early[0], early[1], diagonal), to[2][lane] = packed<__half>(late[0], late[1]), to[3][lane] = cut(late[2], late[3], diagonal);
    }

    // What comes of the products; in it, (I + B C')^-1 by blocks of eight tokens.
    __device__ void finish(Products& a) {
        store(chunk.kr, a.k[0], a.k[1], true), store(chunk.br, a.b[0], a.b[1], true), store(chunk.kc, a.k[2], a.k[3], false);
        float(&x)[4] = a.b[2], (&y)[4] = a.b[3];
        cut(x[0], x[1], false), cut(y[2], y[3], false);
        // Inverses of the two blocks on the diagonal by substitution, a row at a time.
        float early[2] = {row == 2 * quarter ? 1.f : 0.f, row == 2 * quarter + 1 ? 1.f : 0.f}, late[2] = {early[0], early[1]};
#pragma unroll
        for (int t = 7; t > 0; t--) {
            const int from = (lane & 28) + t / 2;
            const float l = __shfl_sync(~0u, x[t % 2], from), m = __shfl_sync(~0u, y[2 + t % 2], from);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                early[e] = fmaf(-l, __shfl_sync(~0u, early[e], 4 * t + quarter), early[e]);
                late[e] = fmaf(-m, __shfl_sync(~0u, late[e], 4 * t + quarter), late[e]);
            }
        }
        // And of the block beside them: -early U late.
        const uint32_t beside[4] = {packed<__half>(y[0], y[1]), 0, 0, 0}, first[4] = {packed<__half>(-early[0], -early[1]), 0, 0, 0};
        const uint32_t last = packed<__half>(-late[0], -late[1]);
        float middle[4] = {}, upper[4] = {};
        multiply<__half>(middle, beside, transposed(last), 0);
        multiply<__half>(upper, first, transposed(packed<__half>(middle[0], middle[1])), 0);
        chunk.solve[0][lane] = first[0], chunk.solve[2][lane] = packed<__half>(upper[0], upper[1]), chunk.solve[3][lane] = last;
    }
};

// SLICES of 16 columns of S, transposed: fragments C of [values][keys], eight keys a tile. Packed in pairs they are fragments A of S'.
template <class T, int VALUES>
struct Wkv7User {
    static constexpr int SLICES = VALUES / 16 / WKV7_USERS;
    typedef Wkv7Chunk<T, VALUES> Chunk;
    const Wkv7& p;
    const int lane, row, quarter, slice;
    float s[SLICES][WKV7_TILES][4];
    float2 after[WKV7_TILES];
    int v_at[SLICES];

    __device__ Wkv7User(const Wkv7& p, int slice) : p(p), lane(threadIdx.x % 32), row(lane / 4), quarter(lane % 4), slice(slice) {
#pragma unroll
        for (int i = 0; i < SLICES; i++) v_at[i] = (slice + i) * 32 + lane / 8 * 8 + (lane % 8 ^ turn_of_values(2 * (slice + i) + lane / 8 % 2));
    }
    template <class F>
    __device__ void each(F f) {
        const int first = blockIdx.x * VALUES + slice * 16 + row;
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
#pragma unroll
            for (int j = 0; j < WKV7_TILES; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) f(s[i][j][e], (j / 4 * 32 + quarter * 8 + j % 4 * 2 + e % 2) * WKV7_DIM + first + i * 16 + e / 2 * 8);
            }
        }
    }
    __device__ void load_state(const float* state) {
        each([&](float& s, int at) { s = state[at] * (1 / WKV7_SCALE); });
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) after[j] = make_float2(1.f, 1.f);
    }
    __device__ void decay() {
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
#pragma unroll
            for (int j = 0; j < WKV7_TILES; j++) s[i][j][0] *= after[j].x, s[i][j][1] *= after[j].y, s[i][j][2] *= after[j].x, s[i][j][3] *= after[j].y;
        }
    }
    __device__ void store_state(float* state) {
        decay();
        each([&](float& s, int at) { state[at] = s * WKV7_SCALE; });
    }
    static __device__ void pack(const float (&x)[4], const float (&y)[4], uint32_t (&to)[4]) {
        to[0] = packed<__half>(x[0], x[1]), to[1] = packed<__half>(x[2], x[3]), to[2] = packed<__half>(y[0], y[1]), to[3] = packed<__half>(y[2], y[3]);
    }
    // c += x y of two tokens' eights, or S += x y of two tiles.
    static __device__ void add(float (&first)[4], float (&second)[4], const uint32_t (&x)[4], const uint32_t (&y)[4]) {
        multiply<__half>(first, x, y[0], y[1]), multiply<__half>(second, x, y[2], y[3]);
    }
    __device__ void add_blocks(float (&c)[SLICES][2][4], const uint32_t (&x)[SLICES][4], const uint32_t (&blocks)[4][32]) {
        uint32_t y[4];
        load_transposed(y, &blocks[0][0] + 4 * lane);
#pragma unroll
        for (int i = 0; i < SLICES; i++) add(c[i][0], c[i][1], x[i], y);
    }
    __device__ void add_state(float (&c)[SLICES][2][4], const uint32_t (&x)[SLICES][4], const uint4& y) {
        const uint32_t words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < SLICES; i++) add(c[i][0], c[i][1], x[i], words);
    }
    // S += (x y)', of y all keys.
    __device__ void add_to_state(const uint32_t (&x)[SLICES][4], const uint32_t (&blocks)[2 * WKV7_TILES][32]) {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            uint32_t y[4];
            load_transposed(y, &blocks[2 * j][0] + 4 * lane);
#pragma unroll
            for (int i = 0; i < SLICES; i++) add(s[i][j], s[i][j + 1], x[i], y);
        }
    }

    // y (values x tokens, divided by WKV7_SCALE), and S after the chunk.
    __device__ void step(const Chunk& chunk, float (&y)[SLICES][2][4]) {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            const float4 by = *(const float4*)&chunk.before[quarter][j];
            after[j] = make_float2(after[j].x * by.x, after[j].y * by.y), after[j + 1] = make_float2(after[j + 1].x * by.z, after[j + 1].y * by.w);
        }
        decay();
        uint32_t v[SLICES][4], u[SLICES][4], state[WKV7_TILES / 2][SLICES][4];
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
            load_transposed(v[i], &chunk.v[0][0] + v_at[i]);
#pragma unroll
            for (int e = 0; e < 4; e++) v[i][e] = as_f16<T>(v[i][e]);
        }
        // Products that others wait for come first; in between, those that wait for nothing.
        float found[SLICES][2][4] = {}, solved[SLICES][2][4] = {};
        add_blocks(found, v, chunk.kc);
#pragma unroll
        for (int k = 0; k < WKV7_TILES / 2; k++) {
#pragma unroll
            for (int i = 0; i < SLICES; i++) pack(s[i][2 * k], s[i][2 * k + 1], state[k][i]);
            add_state(found, state[k], chunk.c[k][lane]);
        }
        add_to_state(v, chunk.k);
#pragma unroll
        for (int i = 0; i < SLICES; i++) pack(found[i][0], found[i][1], u[i]);
        add_blocks(solved, u, chunk.solve);
        add_blocks(y, v, chunk.kr);
#pragma unroll
        for (int k = 0; k < WKV7_TILES / 2; k++) add_state(y, state[k], chunk.r[k][lane]);
#pragma unroll
        for (int i = 0; i < SLICES; i++) pack(solved[i][0], solved[i][1], u[i]);
        add_to_state(u, chunk.b);
        add_blocks(y, u, chunk.br);
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            const float4 by = *(const float4*)&chunk.after[quarter][j];
            after[j] = make_float2(by.x, by.y), after[j + 1] = make_float2(by.z, by.w);
        }
    }

    // y of a chunk to rows of the output, of which so many are left from this lane's first on; its second is 8 further.
    __device__ void store(T* to, int left, const float (&y)[SLICES][2][4]) {
        uint32_t rows[2][2 * SLICES];  // Of both tokens: values pair and pair + 1 of each eight
#pragma unroll
        for (int e = 0; e < 4 * SLICES; e++) {
            const float(&from)[4] = y[e / 4][e % 4 / 2];
            rows[e % 4 / 2][e / 4 * 2 + e % 2] = transposed(packed<T>(WKV7_SCALE * from[e % 2 * 2], WKV7_SCALE * from[e % 2 * 2 + 1]));
        }
#pragma unroll
        for (int e = 0; e < 2 * SLICES; e++) {
            if (left > 0) *(uint32_t*)(to + 8 * e) = rows[0][e];
            if (left > 8) *(uint32_t*)(to + 8 * p.y_row + 8 * e) = rows[1][e];
        }
    }

    __device__ void use_all(Wkv7Shared<T, VALUES>& shared) {
        float* state = p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * WKV7_DIM * WKV7_DIM;
        load_state(state);
        T* to = (T*)p.y + ((long long)blockIdx.z * p.tokens + row) * p.y_row + blockIdx.y * WKV7_DIM + blockIdx.x * VALUES + slice * 16 + 2 * quarter;
        int slot = 0, parity = 0;
        for (int first = 0; first < p.tokens; first += WKV7_CHUNK, to += WKV7_CHUNK * p.y_row) {
            float y[SLICES][2][4] = {};
            await_barrier(&shared.full[slot], parity);
            step(shared.chunks[slot], y);
            __syncwarp();
            if (lane == 0) arrive_at(&shared.empty[slot]);
            if (++slot == WKV7_MAKERS) slot = 0, parity ^= 1;
            store(to, p.tokens - first - row, y);
        }
        store_state(state);
    }
};

template <class T, int VALUES>
__device__ void wkv7_of_values(const Wkv7& p) {
    extern __shared__ __align__(16) char memory[];
    Wkv7Shared<T, VALUES>& shared = *(Wkv7Shared<T, VALUES>*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) shared.weights.fill(p, lane);
    if (threadIdx.x < WKV7_MAKERS) set_barrier(&shared.full[threadIdx.x], 1), set_barrier(&shared.empty[threadIdx.x], WKV7_USERS);
    __syncthreads();
    if (warp < WKV7_MAKERS) {
        Wkv7Maker<T, VALUES> maker(p, shared, warp);
        maker.make_all();
    } else {
        Wkv7User<T, VALUES> user(p, (warp - WKV7_MAKERS) * (VALUES / 16 / WKV7_USERS));
        user.use_all(shared);
    }
}

// Grid (2 for half a head's values in a block, 1 for all, heads, batch), WKV7_THREADS threads, WKV7_SHARED bytes of dynamic shared memory.
template <class T>
__device__ void wkv7_chunks(const Wkv7& p) {
    gridDim.x == 1 ? wkv7_of_values<T, 64>(p) : wkv7_of_values<T, 32>(p);
}

}  // namespace hybrid

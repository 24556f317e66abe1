// RWKV-7 in chunks: a warp that prepares chunks. The names are those of wkv7_chunks.cuh.
#pragma once
#include "wkv7_stage.cuh"

namespace hybrid {

// Two tiles of the rows: fragments B of R' and C', fragments A of K and B.
struct Wkv7Rows {
    uint32_t r[4], c[4], k[4], b[4];
};

template <class T, int VALUES>
struct Wkv7Producer {
    static constexpr int VECTORS = VALUES / 8, PRODUCERS = Wkv7Shared<T, VALUES>::PRODUCERS;
    const Wkv7& p;
    Wkv7Chunk<T, VALUES>& chunk;
    Wkv7Raw& raw;
    const Wkv7Weights& weights;
    const int lane, row, quarter, head;
    const long long start;
    uint64_t *full, *empty;
    const T *key_at, *a_at, *r_at, *w_at, *v_at;  // This lane's first pieces of the next chunk
    float decay[WKV7_TILES];
    // A matrix from logarithms of decays to those of W(t) / M; row 7, where that is 1, gives 1 / M.
    uint32_t sums[4];

    __device__ Wkv7Producer(const Wkv7& p, Wkv7Shared<T, VALUES>& shared, int warp)
        : p(p), chunk(shared.chunks[warp]), raw(shared.raw[warp]), weights(shared.weights), lane(threadIdx.x % 32), row(lane / 4), quarter(lane % 4),
          head(blockIdx.y * WKV7_DIM), start((long long)blockIdx.z * p.tokens), full(&shared.full[warp]), empty(&shared.empty[warp]) {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) {
            // Logarithms are computed as fragments B, in which a lane has column `row` of each
            // tile.
            decay[j] = -LOG2_E * p.decay[head + j / 4 * 32 + row / 2 * 8 + j % 4 * 2 + row % 2];
        }
        const long long token = start + warp * WKV7_CHUNK + lane / 8;
        const int at = head + lane % 8 * 8;
        key_at = (const T*)p.key + token * p.key_row + at, a_at = (const T*)p.a + token * p.a_row + at;
        r_at = (const T*)p.r + token * p.r_row + at, w_at = (const T*)p.w + token * p.w_row + at;
        v_at = (const T*)p.v + (start + warp * WKV7_CHUNK + lane / VECTORS) * p.v_row + head + blockIdx.x * VALUES + lane % VECTORS * 8;
        chunk.kr[1][lane] = chunk.br[1][lane] = chunk.kc[1][lane] = chunk.solve[1][lane] = 0;
        const int s = 2 * quarter;  // Columns s, s + 1, s + 8 and s + 9
        auto early = [&](int s) { return row == 7 || s > row ? -1.f : 0.f; };
        auto late = [&](int s) { return s <= row ? 1.f : 0.f; };
        sums[0] = packed<__half>(early(s), early(s + 1)), sums[1] = sums[2] = none(), sums[3] = packed<__half>(late(s), late(s + 1));
    }
    // Returns zero in a register that the compiler keeps.
    __device__ uint32_t none() {
        uint32_t x;
        asm volatile("mov.b32 %0, 0;" : "=r"(x));
        return x;
    }

    // Copies an input of this warp's next chunk, which has `left` tokens. Tokens beyond become
    // zeros.
    template <class F>
    __device__ void load(const T*& from, int stride, uint4 (&to)[WKV7_CHUNK][8], int left, F turn) {
        const T* at = from;
#pragma unroll
        for (int t = 0; t < WKV7_CHUNK; t += 4, at += 4 * stride) {
            const int token = lane / 8 + t;
            copy16(&to[token][lane % 8 ^ turn(token)], at, token < left);
        }
        from += PRODUCERS * WKV7_CHUNK * (long long)stride;
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
        constexpr int STEP = 32 / VECTORS;
        const int eight = lane % VECTORS;
#pragma unroll
        for (int t = 0; t < WKV7_CHUNK; t += STEP, at += STEP * p.v_row) {
            const int token = lane / VECTORS + t;
            copy16(&chunk.v[eight / 2][(token / 8 * 2 + eight % 2) * 8 + (token % 8 ^ turn_of_values(eight))], at, token < left);
        }
        v_at += PRODUCERS * WKV7_CHUNK * (long long)p.v_row;
        end_copies();
    }

    // Computes the base-2 logarithms of W(t) / M, and in row 7 that of 1 / M.
    __device__ void sum_decays(int left, float (&g)[WKV7_TILES][4]) {
        constexpr float UNIT = -1.f / (0.6065306597126334f * LOG2_E);
        const uint32_t select = row % 2 ? 0x7632 : 0x5410;
        // Tokens beyond the last have the decay 1.
        auto mask = [&](int t) { return (t < left ? 0xffffu : 0) | (t + 1 < left ? 0xffff0000u : 0); };
        const uint32_t there[2] = {mask(2 * quarter), mask(2 * quarter + 8)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[4][4];  // Tokens t, t + 1, t + 8 and t + 9
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

    // Loads four tiles of token row + 8 late.
    __device__ void words(const uint4 (&from)[WKV7_CHUNK][8], int half, int late, uint32_t (&to)[4]) {
        four(from[row + 8 * late][4 * half + quarter ^ turn_of_rows(row)], to);
    }

    // Returns the diagonal of a 16 x 16 matrix, given as its first and last eight columns: elements
    // `row` and row + 8, to all lanes of the row.
    __device__ float2 diagonal(const float (&early)[4], const float (&late)[4]) {
        const float x = row % 2 ? early[1] : early[0], y = row % 2 ? late[3] : late[2];
        const int from = (lane & 28) + row / 2;
        return make_float2(__shfl_sync(~0u, x, from), __shfl_sync(~0u, y, from));
    }

    // Converts keys to f16, and computes c, the removal keys of length 1.
    __device__ void remove(uint32_t (&key)[WKV7_TILES][2], uint32_t (&c)[WKV7_TILES][2]) {
        float early[4] = {}, late[4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[2][4], scales[4];
            words(raw.key, half, 0, x[0]), words(raw.key, half, 1, x[1]), four(weights.removal[quarter][half], scales);
#pragma unroll
            for (int j = 4 * half; j < 4 * half + 4; j += 2) {
                // Computed twice, because the registers of fragments A and B are in different
                // orders.
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

    // The inputs of half of the head, for tokens row and row + 8, and the constants.
    struct Half {
        uint32_t a[2][4], r[2][4], rate_bias[4], key_rate[4];
    };
    __device__ void read(int half, Half& to) {
#pragma unroll
        for (int late = 0; late < 2; late++) words(raw.a, half, late, to.a[late]), words(raw.r, half, late, to.r[late]);
        four(weights.rate_bias[quarter][half], to.rate_bias), four(weights.key_rate[quarter][half], to.key_rate);
    }

    // Computes the rows of tile j, the i-th of two.
    __device__ void make_tile(int j, int i, const Half& from, const float (&g)[4], const uint32_t (&key)[2], const uint32_t (&unit)[2], Wkv7Rows& to) {
        float2 down[2] = {{exp2_of(-g[0]), exp2_of(-g[1])}, {exp2_of(-g[2]), exp2_of(-g[3])}};
        const float2 up[2] = {{exp2_of(g[0]), exp2_of(g[1])}, {exp2_of(g[2]), exp2_of(g[3])}};
        if (row == 7) chunk.before[quarter][j] = down[0], chunk.after[quarter][j] = up[1];
        uint32_t ups[2] = {packed<__half>(up[0].x, up[0].y), packed<__half>(up[1].x, up[1].y)};
        // W(t - 1) / M is in the row above. Row 0 takes 1 / M from row 7.
        uint32_t before[2] = {__shfl_sync(~0u, ups[0], lane + 28 & 31), __shfl_sync(~0u, ups[1], lane + 28 & 31)};
        if (row == 0) before[1] = ONES;
        if (row == 7) ups[0] = ONES, down[0] = make_float2(1.f, 1.f);
        const int at = j % 4;
        const float2 bias = unpacked<__half>(from.rate_bias[at]), slope = unpacked<__half>(from.key_rate[at]);
        const float2 base = {1 / WKV7_SCALE - slope.x, 1 / WKV7_SCALE - slope.y};
#pragma unroll
        for (int late = 0; late < 2; late++) {
            const float2 x = unpacked<T>(from.a[late][at]), keys = unpacked<__half>(key[late]), by = down[late];
            // Twice the rate, minus 1
            const float2 rate = {tanh_of(fmaf(x.x, 0.5f, bias.x)), tanh_of(fmaf(x.y, 0.5f, bias.y))};
            const uint32_t rates = times_plus(packed<__half>(rate.x, rate.y), HALVES, HALVES);
            to.k[2 * i + late] = packed<__half>(keys.x * fmaf(rate.x, slope.x, base.x) * by.x, keys.y * fmaf(rate.y, slope.y, base.y) * by.y);
            to.b[2 * i + late] = times(times(unit[late], rates), packed<__half>(by.x, by.y));
            to.c[i + 2 * late] = times(unit[late], before[late]);
            to.r[i + 2 * late] = times(as_f16<T>(from.r[late][at]), ups[late]);
            chunk.k[2 * j + late][lane] = to.k[2 * i + late], chunk.b[2 * j + late][lane] = to.b[2 * i + late];
        }
    }

    // Products of the rows: of K and B with eight tokens of R, eight more, and the same of C.
    // bonus: K times R o bonus_weight.
    struct Products {
        float k[4][4], b[4][4], bonus[2][4];
    };
    __device__ void multiply_rows(const Wkv7Rows& x, int step, bool bonus_wanted, Products& to) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint32_t r[2] = {x.r[2 * n], x.r[2 * n + 1]}, c[2] = {x.c[2 * n], x.c[2 * n + 1]};
            multiply<__half>(to.k[n], x.k, r[0], r[1]), multiply<__half>(to.b[n], x.b, r[0], r[1]);
            multiply<__half>(to.k[2 + n], x.k, c[0], c[1]), multiply<__half>(to.b[2 + n], x.b, c[0], c[1]);
        }
        if (bonus_wanted) {
            const uint2 bonus = ((const uint2*)&weights.bonus[quarter][0])[step];
#pragma unroll
            for (int n = 0; n < 2; n++) multiply<__half>(to.bonus[n], x.k, times(x.r[2 * n], bonus.x), times(x.r[2 * n + 1], bonus.y));
        }
    }

    __device__ void produce(int index, int parity) {
        const int left = p.tokens - index * WKV7_CHUNK, next = left - PRODUCERS * WKV7_CHUNK;
        const bool bonus_wanted = p.bonus && blockIdx.x == 0;
        await_copies<1>();
        __syncwarp();
        float g[WKV7_TILES][4];
        uint32_t key[WKV7_TILES][2], unit[WKV7_TILES][2];
        sum_decays(left, g);
        remove(key, unit);
        __syncwarp();  // All lanes have read the inputs that are overwritten now.
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
                multiply_rows(rows, step, bonus_wanted, products);
            }
        }
        __syncwarp();
        next > 0 ? load_second(next) : end_copies();
        if (bonus_wanted) store_bonus(index, left, diagonal(products.bonus[0], products.bonus[1]));
        finish(products);
        await_copies<1>();  // Waits for the values.
        __syncwarp();
    }
    __device__ void store_bonus(int index, int left, float2 sums) {
        float* to = p.bonus + (start + index * WKV7_CHUNK + row) * p.heads + blockIdx.y;
        if (quarter == 0 && row < left) *to = WKV7_SCALE * sums.x;
        if (quarter == 0 && row + 8 < left) to[8 * p.heads] = WKV7_SCALE * sums.y;
    }

    __device__ void produce_all() {
        int parity = 1, index = threadIdx.x / 32;
        const int left = p.tokens - index * WKV7_CHUNK;
        if (left > 0) load_first(left), load_second(left);
        for (; index * WKV7_CHUNK < p.tokens; index += PRODUCERS, parity ^= 1) {
            produce(index, parity);
            if (lane == 0) arrive_at(full);
        }
    }

    // Zeroes the elements below the diagonal of an 8 x 8 block, and those on it unless `diagonal`.
    __device__ uint32_t cut(float& x, float& y, bool diagonal) {
        const int t = 2 * quarter, s = diagonal ? row : row + 1;
        if (t < s) x = 0.f;
        if (t + 1 < s) y = 0.f;
        return packed<__half>(x, y);
    }
    // Stores the accumulators of 16 tokens s times eight tokens t each, for s <= t if `diagonal`,
    // otherwise s < t.
    __device__ void store(uint32_t (&to)[4][32], float (&early)[4], float (&late)[4], bool diagonal) {
        to[0][lane] = cut(early[0], early[1], diagonal), to[2][lane] = packed<__half>(late[0], late[1]), to[3][lane] = cut(late[2], late[3], diagonal);
    }

    // Computes a chunk's results from the products, including (I + B C')^-1 in blocks of eight
    // tokens.
    __device__ void finish(Products& a) {
        store(chunk.kr, a.k[0], a.k[1], true), store(chunk.br, a.b[0], a.b[1], true), store(chunk.kc, a.k[2], a.k[3], false);
        float(&x)[4] = a.b[2], (&y)[4] = a.b[3];
        cut(x[0], x[1], false), cut(y[2], y[3], false);
        // Inverts the two blocks on the diagonal by substitution, a row at a time.
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
        // The block off the diagonal of the inverse is -early U late.
        const uint32_t beside[4] = {packed<__half>(y[0], y[1]), 0, 0, 0}, first[4] = {packed<__half>(-early[0], -early[1]), 0, 0, 0};
        const uint32_t last = packed<__half>(-late[0], -late[1]);
        float middle[4] = {}, upper[4] = {};
        multiply<__half>(middle, beside, transposed(last), 0);
        multiply<__half>(upper, first, transposed(packed<__half>(middle[0], middle[1])), 0);
        chunk.solve[0][lane] = first[0], chunk.solve[2][lane] = packed<__half>(upper[0], upper[1]), chunk.solve[3][lane] = last;
    }
};

}  // namespace hybrid

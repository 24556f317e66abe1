// A producer of wkv.cuh for decays of each token.
//
// A lane has eight keys of four consecutive tokens. It uses the decays of other tokens only as
// products of four. Operands are passed through shared memory.
#pragma once
#include "wkv_stage.cuh"

namespace hybrid {

__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
template <class T>
__device__ __forceinline__ uint32_t packed(float2 x) { return packed<T>(x.x, x.y); }

// The factors of two adjacent keys of the four tokens.
template <class T>
struct WkvFactors {
    uint32_t before[3], after[3];  // w0, w0 w1, w0 w1 w2 for r; w1 w2 w3, w2 w3, w3 for k
    uint32_t one, two;             // w1, w2
    // Product of the decays of the other four tokens of the same eight
    uint32_t near;
    // Products of the decays from the chunk's start to the four tokens, and from them to its end
    uint32_t start, end;
    float2 all;                    // Product of all decays of the chunk

    __device__ __forceinline__ WkvFactors(const float2 (&w)[4], int quarter) {
        auto from = [](float2 x, int apart) { return make_float2(__shfl_xor_sync(~0u, x.x, apart), __shfl_xor_sync(~0u, x.y, apart)); };
        const float2 w01 = w[0] * w[1], w23 = w[2] * w[3], four = w01 * w23;
        const float2 adjacent = from(four, 8), eight = four * adjacent, far = from(eight, 16);
        all = eight * far;
        before[0] = packed<T>(w[0]), before[1] = packed<T>(w01), before[2] = packed<T>(w01 * w[2]);
        after[0] = packed<T>(w[1] * w23), after[1] = packed<T>(w23), after[2] = packed<T>(w[3]);
        one = packed<T>(w[1]), two = packed<T>(w[2]), near = packed<T>(adjacent);
        const uint32_t beyond = packed<T>(far), none = packed<T>(1.f, 1.f);
        start = times<T>(quarter & 1 ? near : none, quarter & 2 ? beyond : none), end = times<T>(quarter & 1 ? none : near, quarter & 2 ? none : beyond);
    }
};

template <class T>
struct Wkv6Producer : WkvLoader<T, true> {
    typedef WkvLoader<T, true> Loader;
    typedef uint32_t Keys[4];  // Pairs of this lane's keys
    using Loader::chunks, Loader::keys, Loader::lane, Loader::stage, Loader::producer, Loader::p, Loader::quarter, Loader::roles;
    const WkvConstants<T, true>& constants;
    float2 decay[4];

    __device__ Wkv6Producer(const Wkv& p, WkvStage<T, true>& stage, const WkvConstants<T, true>& constants) : Loader(p, stage), constants(constants) {
        for (int i = lane; i < WKV_CHUNK * (WKV_CHUNK + PAD) / 2; i += 32) reinterpret_cast<uint32_t*>(stage.a)[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) decay[j] = *reinterpret_cast<const float2*>(&constants.decay[keys + 2 * j]);
    }

    // Loads operands of 16 rows and 16 keys, and of 8 rows and 32 keys. `row` is this lane's row.
    __device__ void sixteen_rows(uint32_t (&x)[4], const T* row, int k) const { load_matrices(x, row + k * 16 + lane / 16 * 8); }
    __device__ void eight_rows(uint32_t (&x)[4], const T* row, int k) const { load_matrices(x, row + k * 32 + lane / 8 * 8); }

    // N products of 8 rows and 8 columns. `row` is this lane's row of 16, eight for each product;
    // `columns` are its columns, one for each product. Returns row lane / 4, columns 2 (lane % 4)
    // and the next.
    template <int N>
    __device__ void products(const T* row, const T* const (&columns)[N], float2 (&to)[N]) const {
        float c[N][4] = {};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t x[4], y[4];
            sixteen_rows(x, row, 2 * k), sixteen_rows(y, row, 2 * k + 1);
#pragma unroll
            for (int i = 0; i < N; i++) {
                uint32_t z[4];
                eight_rows(z, columns[i], k);
                multiply<T>(c[i], x, z[0], z[1]);
                multiply<T>(c[i], y, z[2], z[3]);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = make_float2(c[i][2 * i], c[i][2 * i + 1]);
    }

    // If column == row / 2, returns the elements of A at the diagonal, for `row` and row + 8: A(t,
    // t - 1) and A(t, t) for an odd token t, A(t, t) and 0 for an even one.
    __device__ void own_pairs(const WkvRows<T>& r, const WkvRows<T>& k, int row, int column, uint32_t (&to)[2]) const {
        float own[2][4] = {}, plain[2][4] = {};
        const T* r_row = r[lane % 16];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t x[4], y[4], u[4];
            sixteen_rows(x, r_row, 2 * h), sixteen_rows(y, r_row, 2 * h + 1);
#pragma unroll
            for (int e = 0; e < 4; e++) u[e] = *reinterpret_cast<const uint32_t*>(&constants.u[32 * h + 8 * e + 2 * column]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t z[4];
                eight_rows(z, k[8 * i + lane % 8], h);
                multiply<T>(plain[i], x, z[0], z[1]);
                multiply<T>(plain[i], y, z[2], z[3]);
                multiply<T>(own[i], x, times<T>(z[0], u[0]), times<T>(z[1], u[1]));
                multiply<T>(own[i], y, times<T>(z[2], u[2]), times<T>(z[3], u[3]));
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) to[i] = row % 2 ? packed<T>(plain[i][2 * i], own[i][2 * i + 1]) : packed<T>(own[i][2 * i], 0.f);
    }

    // FULL: the chunk has no tokens beyond the last.
    template <bool FULL>
    __device__ void produce(int chunk) {
        const int half = this->half, line = lane % 8, row = lane / 4, column = lane % 4;
        auto &input_r = stage.input_r[half], &input_k = stage.input_k[half];
        await_copies<1>();
        __syncwarp();
        uint32_t own[2];
        own_pairs(input_r, input_k, row, column, own);
        Keys r[4], k[4], w[4], r_chunk[4], k_chunk[4], r_pair, k_pair, near;
        float2 all[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = quarter * 4 + i;
            load16(r[i], &input_r[t][keys]), load16(k[i], &input_k[t][keys]), load16(w[i], &stage.w[half][t][keys]);
        }
        __syncwarp();
        // Level 2: of each four tokens, the last two supply r, the first two k.
        store16(&stage.pairs[quarter * 2][keys], r[2]), store16(&stage.pairs[9 + quarter * 2][keys], k[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 decays[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = unpacked<T>(w[i][j]);
                decays[i] = make_float2(exp2_of(-exp2_of(fmaf(x.x, LOG2_E, decay[j].x))), exp2_of(-exp2_of(fmaf(x.y, LOG2_E, decay[j].y))));
                if (!FULL && chunk * WKV_CHUNK + quarter * 4 + i >= p.tokens) decays[i] = make_float2(1.f, 1.f);
            }
            const WkvFactors<T> f(decays, quarter);
            r_pair[j] = times<T>(r[3][j], f.two), k_pair[j] = times<T>(k[0][j], f.one);
#pragma unroll
            for (int i = 0; i < 3; i++) r[i + 1][j] = times<T>(r[i + 1][j], f.before[i]), k[i][j] = times<T>(k[i][j], f.after[i]);
#pragma unroll
            for (int i = 0; i < 4; i++) r_chunk[i][j] = times<T>(r[i][j], f.start), k_chunk[i][j] = times<T>(k[i][j], f.end);
            near[j] = f.near, all[j] = f.all;
        }
        store16(&stage.pairs[quarter * 2 + 1][keys], r_pair), store16(&stage.pairs[8 + quarter * 2][keys], k_pair);
        // Levels 4 and 8: overwrites r and k in shared memory with their products with the decays
        // of their own four tokens. The four tokens furthest from the chunk's middle are also
        // stored with the decays of four more. The eight rows of a level are contiguous, so that
        // they are in different banks.
        if (chunk != producer) roles.wait_empty(producer);
        const int r_place = quarter % 3 * 4, k_place = quarter == 1 ? 12 : quarter * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = quarter * 4 + i;
            if (quarter > 0) store16(&input_r[r_place + i][keys], r[i]);
            if (quarter < 3) store16(&input_k[k_place + i][keys], k[i]);
            store16(&stage.r[t][keys], r_chunk[i]), store16(&stage.k[t][keys], k_chunk[i]);
        }
        if (quarter == 0 || quarter == 3) {
            T* to = quarter ? &input_r[12][keys] : &input_k[8][keys];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Keys x;
#pragma unroll
                for (int j = 0; j < 4; j++) x[j] = times<T>(quarter ? r[i][j] : k[i][j], near[j]);
                store16(to + i * (HEAD + PAD), x);
            }
        }
        if (quarter == 0) {
            *reinterpret_cast<float4*>(&stage.decay[keys]) = make_float4(all[0].x, all[0].y, all[1].x, all[1].y);
            *reinterpret_cast<float4*>(&stage.decay[keys + 4]) = make_float4(all[2].x, all[2].y, all[3].x, all[3].y);
        }
        __syncwarp();
        const T *const columns[2] = {stage.pairs[8 + line], input_k[line]}, *const early[1] = {input_k[8 + line]};
        float2 small[2], eight[1];
        products(lane / 8 % 2 ? input_r[line ^ 4] : stage.pairs[line], columns, small);
        products(input_r[8 + line], early, eight);
        if (row / 2 == column) store4(&stage.a[row][row & ~1], own[0]), store4(&stage.a[row + 8][row + 8 & ~1], own[1]);
        if (row / 2 == column) store4(&stage.a[row / 2 * 4 + 2 + row % 2][4 * column], packed<T>(small[0]));
        if (row / 4 == column / 2) store4(&stage.a[row + 4 + row / 4 * 4][2 * column + row / 4 * 4], packed<T>(small[1]));
        store4(&stage.a[8 + row][2 * column], packed<T>(eight[0]));
        __syncwarp();
        roles.arrive_full(producer / 2);
        this->load();
    }

    __device__ void run() {
        this->load(), this->load();
        for (int chunk = producer; chunk < chunks; chunk += roles.producers) {
            if ((chunk + 1) * WKV_CHUNK <= p.tokens) produce<true>(chunk);
            else produce<false>(chunk);
        }
        await_copies<0>();
    }
};

}  // namespace hybrid

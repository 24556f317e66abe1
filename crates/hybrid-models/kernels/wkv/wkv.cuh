// The recurrence of RWKV-5 and 6 for prompts, in chunks of 16 tokens with matrix products. With
// W(t) the product of a chunk's decays up to token t and S the state before the chunk,
//
//     y(t) = (r(t) o W(t - 1)) S + sum over s <= t of A(t, s) v(s),
//     S <- diag(W(end)) S + sum over s of (k(s) o W(end) / W(s)) v(s)'
//     A(t, s) = r(t) . (k(s) o w(s + 1) ... w(t - 1)),  A(t, t) = r(t) . (u o k(t))
//
// There is no division by decays, so any decays from 0 to 1 are valid. For s < t, let L be the
// highest bit in which they differ, and m = t with its bits below L cleared. Then
//
//     A(t, s) = (r(t) o w(m) ... w(t - 1)) . (k(s) o w(s + 1) ... w(m - 1))
//
// A level L needs one product, of the eight tokens with the bit and the eight without.
//
// A block processes a head's values, or half of them, through all tokens. Some of its warps, the
// producers, prepare chunks in turn. The others, the consumers, process all chunks in order, each
// with 16 columns of S (values) in f32 registers. Inputs of products are rounded to 16 bits,
// including S for the outputs.
#pragma once
#include <cstddef>
#include <type_traits>
#include "wkv5_producer.cuh"
#include "wkv6_producer.cuh"

namespace hybrid {

// 16 columns of S, transposed, as fragments C of [values][keys], eight keys per tile. Packed in
// pairs, they are also fragments B of S.
template <class T, bool TOKEN_DECAYS>
struct WkvConsumer {
    typedef WkvStage<T, TOKEN_DECAYS> Stage;
    // S may exceed the range of f16, 65504
    static constexpr bool NARROW = std::is_same<T, __half>::value;
    const Wkv& p;
    const WkvRoles roles;
    const int lane, row, pair, first;
    float* const state;
    float s[HEAD / 8][4];
    float seen = 0;  // NaN after a read of an S that was not finite in T

    __device__ WkvConsumer(const Wkv& p)
        : p(p), lane(threadIdx.x % 32), row(lane / 4), pair(lane % 4 * 2), first((blockIdx.x * roles.consumers + threadIdx.x / 32) * 16),
          state(p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * HEAD * HEAD + pair * HEAD + first + row) {}

    __device__ void load_state() {
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) s[i / 4][i % 4] = state[(i / 4 * 8 + i % 2) * HEAD + i / 2 % 2 * 8];
    }
    __device__ void store_state() {
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) state[(i / 4 * 8 + i % 2) * HEAD + i / 2 % 2 * 8] = s[i / 4][i % 4];
    }

    // Rounds S: [keys 8 j..][values 8 n..]. SCALED: if S is too large, it is divided by 2^16.
    // Returns the factor for the outputs.
    template <bool SCALED>
    __device__ float round_state(uint32_t (&to)[HEAD / 8][2]) const {
        auto pack = [&](float by) {
#pragma unroll
            for (int i = 0; i < HEAD / 4; i++) to[i / 2][i % 2] = packed<T>(s[i / 2][i % 2 * 2] * by, s[i / 2][i % 2 * 2 + 1] * by);
        };
        pack(1.f);
        if (SCALED) {
            bool large = false;
#pragma unroll
            for (int i = 0; i < HEAD / 2; i++) large |= fabsf(s[i / 4][i % 4]) >= 65504.f;
            if (__any_sync(~0u, large)) return pack(1.f / 65536), 65536.f;
        }
        return 1.f;
    }

    // Computes a chunk's outputs and the S after it. `stage` and `v_at` are shared addresses of the
    // producer's results and of the chunk's values.
    template <bool SCALED>
    __device__ __forceinline__ void consume(uint32_t stage, uint32_t v_at, float (&y)[2][4]) {
        uint32_t rounded_s[HEAD / 8][2], a[4], v[4], v_transposed[4], r[4][4], k[4][4];
        const float scale = round_state<SCALED>(rounded_s);
        // This lane's row of matrices 16 elements wide; `bytes` is the size of a row.
        const int sixteen = lane % 16, right = lane / 16 * 16, bytes = sizeof(Stage::r[0]);
        const uint32_t rows = stage + sixteen * bytes + right;
#pragma unroll
        for (int i = 0; i < 4; i++) load_matrices(r[i], rows + offsetof(Stage, r) + 32 * i);
        load_transposed(v, v_at + sixteen * bytes + right + 2 * first);
        load_transposed(v_transposed, v_at + (lane / 16 * 8 + lane % 8) * bytes + lane / 8 % 2 * 16 + 2 * first);
#pragma unroll
        for (int i = 0; i < 4; i++) load_transposed(k[i], rows + offsetof(Stage, k) + 32 * i);
        load_matrices(a, stage + offsetof(Stage, a) + sixteen * sizeof(Stage::a[0]) + right);
        float part[2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int n = 0; n < 2; n++) multiply<T>(i % 2 ? part[n] : y[n], r[i], rounded_s[2 * i][n], rounded_s[2 * i + 1][n]);
        }
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
            float2 decay;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(decay.x), "=f"(decay.y) : "r"(stage + (int)offsetof(Stage, decay) + 4 * pair + 32 * j));
            s[j][0] *= decay.x, s[j][1] *= decay.y, s[j][2] *= decay.x, s[j][3] *= decay.y;
            multiply<T>(s[j], v_transposed, k[j / 2][j % 2 * 2], k[j / 2][j % 2 * 2 + 1]);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) y[e / 4][e % 4] = (y[e / 4][e % 4] + part[e / 4][e % 4]) * scale;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            // One row of outputs is enough to detect an overflow in any column of S.
            if (NARROW && !SCALED) seen = fmaf(y[n][0], 0.f, fmaf(y[n][1], 0.f, seen));
            multiply<T>(y[n], a, v[2 * n], v[2 * n + 1]);
        }
    }

    // Processes all chunks. If not SCALED, returns whether S exceeded the range of its copies in T.
    template <bool SCALED>
    __device__ bool run(const Stage* all) {
        const uint32_t start = shared_address(all);
        const int chunks = wkv_chunks(p.tokens), below = 8 * p.y_row;
        T* to = (T*)p.y + ((long long)blockIdx.z * p.tokens + row) * p.y_row + blockIdx.y * HEAD + first + pair;
        // Tokens from this lane's first row of the chunk on; its second row is 8 tokens later
        int left = p.tokens - row;
        int producer = 0, turn = 0;
        load_state();
        for (int i = 0; i < chunks; i += 2) {
            const uint32_t at = start + producer * (int)sizeof(Stage), v_at = at + (int)offsetof(Stage, v) + turn * (int)sizeof(Stage::v[0]);
            float y[2][2][4] = {};
            roles.wait_full(producer / 2);
            consume<SCALED>(at, v_at, y[0]);
            consume<SCALED>(at + (int)sizeof(Stage), v_at + (int)sizeof(Stage), y[1]);
            if (i + roles.producers < chunks) roles.arrive_empty(producer), roles.arrive_empty(producer + 1);
#pragma unroll
            for (int j = 0; j < 4; j++, left -= 8, to += below) {
                if (left > 0) {
#pragma unroll
                    for (int n = 0; n < 2; n++) store4(to + 8 * n, packed<T>(y[j / 2][n][j % 2 * 2], y[j / 2][n][j % 2 * 2 + 1]));
                }
            }
            producer += 2;
            if (producer == roles.producers) producer = 0, turn = turn == 2 ? 0 : turn + 1;
        }
        return seen != 0;
    }
};

// Grid (1 or 2, heads, batch), 32 (HEAD / 16 / grid.x + producers) threads, with an even number of
// producers up to 6. Dynamic shared memory: WkvConstants, and a WkvStage for each producer.
template <class T, bool TOKEN_DECAYS>
__device__ void wkv(const Wkv& p) {
    extern __shared__ __align__(16) char memory[];
    typedef WkvConstants<T, TOKEN_DECAYS> Constants;
    typedef typename std::conditional<TOKEN_DECAYS, Wkv6Producer<T>, Wkv5Producer<T>>::type Producer;
    typedef WkvConsumer<T, TOKEN_DECAYS> Consumer;
    Constants& constants = *(Constants*)memory;
    WkvStage<T, TOKEN_DECAYS>* stage = (WkvStage<T, TOKEN_DECAYS>*)(memory + sizeof(Constants));
    const WkvRoles roles;
    constants.fill(p);
    __syncthreads();
    if (roles.producer >= 0) {
        for (bool again = false;; again = true) {
            Producer(p, stage[roles.producer], constants).run();
            if (!Consumer::NARROW || again || !__syncthreads_or(false)) return;
        }
    }
    Consumer consumer(p);
    const bool large = consumer.template run<false>(stage);
    // Processes all chunks again; so do the producers
    if (Consumer::NARROW && __syncthreads_or(large)) consumer.template run<true>(stage);
    consumer.store_state();
}

template <class T>
__device__ void wkv5(const Wkv& p) { wkv<T, false>(p); }
template <class T>
__device__ void wkv6(const Wkv& p) { wkv<T, true>(p); }

}  // namespace hybrid

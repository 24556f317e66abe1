// RWKV-7 in chunks: a warp that processes all chunks with 16 columns of the state. The names are
// those of wkv7_chunks.cuh.
#pragma once
#include "wkv7_stage.cuh"

namespace hybrid {

// 16 columns of S, transposed, as fragments C of [values][keys], eight keys per tile. Packed in
// pairs, they are fragments A of S'.
template <class T, int VALUES>
struct Wkv7Consumer {
    typedef Wkv7Chunk<T, VALUES> Chunk;
    typedef Wkv7Shared<T, VALUES> Shared;
    const Wkv7& p;
    Shared& shared;
    const int lane, row, quarter, slice, v_at;
    float s[WKV7_TILES][4];
    // The start of the next chunk: its values, C, the factors of S before it (`decay`), and the
    // part of U that its own keys give (`found`).
    uint32_t v[4], c[WKV7_TILES / 2][4];
    float2 decay[WKV7_TILES];
    float found[2][4];
    int slot = 0, parity = 0;

    __device__ Wkv7Consumer(const Wkv7& p, Shared& shared, int slice)
        : p(p), shared(shared), lane(threadIdx.x % 32), row(lane / 4), quarter(lane % 4), slice(slice),
          v_at(slice * 32 + lane / 8 * 8 + (lane % 8 ^ turn_of_values(2 * slice + lane / 8 % 2))) {}

    template <class F>
    __device__ void each(F f) {
        const int first = blockIdx.x * VALUES + slice * 16 + row;
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) f(s[j][e], (j / 4 * 32 + quarter * 8 + j % 4 * 2 + e % 2) * WKV7_DIM + first + e / 2 * 8);
        }
    }
    __device__ void load_state(const float* state) {
        each([&](float& s, int at) { s = state[at] * (1 / WKV7_SCALE); });
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) decay[j] = make_float2(1.f, 1.f);
    }
    __device__ void decay_state() {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j++) s[j][0] *= decay[j].x, s[j][1] *= decay[j].y, s[j][2] *= decay[j].x, s[j][3] *= decay[j].y;
    }
    __device__ void store_state(float* state) {
        decay_state();
        each([&](float& s, int at) { state[at] = s * WKV7_SCALE; });
    }

    static __device__ void pack(const float (&x)[4], const float (&y)[4], uint32_t (&to)[4]) {
        to[0] = packed<__half>(x[0], x[1]), to[1] = packed<__half>(x[2], x[3]), to[2] = packed<__half>(y[0], y[1]), to[3] = packed<__half>(y[2], y[3]);
    }
    // c += x y, for the two halves of a chunk's tokens or for two tiles of S.
    static __device__ void add(float (&first)[4], float (&second)[4], const uint32_t (&x)[4], const uint32_t (&y)[4]) {
        multiply<__half>(first, x, y[0], y[1]), multiply<__half>(second, x, y[2], y[3]);
    }
    __device__ void load(const uint32_t (&blocks)[4][32], uint32_t (&to)[4]) { load_transposed(to, &blocks[0][0] + 4 * lane); }
    __device__ void add(float (&c)[2][4], const uint32_t (&x)[4], const uint32_t (&blocks)[4][32]) {
        uint32_t y[4];
        load(blocks, y);
        add(c[0], c[1], x, y);
    }
    // S += (x y)', for all keys of y.
    __device__ void add_to_state(const uint32_t (&x)[4], const uint32_t (&blocks)[2 * WKV7_TILES][32]) {
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            uint32_t y[4];
            load_transposed(y, &blocks[2 * j][0] + 4 * lane);
            add(s[j], s[j + 1], x, y);
        }
    }

    // Computes everything of the slot's chunk that does not need S.
    __device__ void begin() {
        await_barrier(&shared.full[slot], parity);
        const Chunk& chunk = shared.chunks[slot];
        load_transposed(v, &chunk.v[0][0] + v_at);
        uint32_t kc[4];
        load(chunk.kc, kc);
#pragma unroll
        for (int k = 0; k < WKV7_TILES / 2; k++) four(chunk.c[k][lane], c[k]);
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            const float4 by = *(const float4*)&chunk.before[quarter][j];
            decay[j].x *= by.x, decay[j].y *= by.y, decay[j + 1].x *= by.z, decay[j + 1].y *= by.w;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = as_f16<T>(v[e]), found[0][e] = found[1][e] = 0.f;
        add(found[0], found[1], v, kc);
    }

    // Computes S after the chunk, and its y (values x tokens, divided by WKV7_SCALE). The next
    // chunk begins in between, so that S waits only for products.
    __device__ void step(bool last, float (&y)[2][4]) {
        const Chunk& chunk = shared.chunks[slot];
        uint64_t* empty = &shared.empty[slot];
        uint32_t u[4], state[WKV7_TILES / 2][4];
        float more[2][4] = {}, solved[2][4] = {};
        decay_state();
#pragma unroll
        for (int k = 0; k < WKV7_TILES / 2; k++) {
            pack(s[2 * k], s[2 * k + 1], state[k]);
            k % 2 ? add(more[0], more[1], state[k], c[k]) : add(found[0], found[1], state[k], c[k]);
        }
        add_to_state(v, chunk.k);
        uint32_t solve[4];
        load(chunk.solve, solve);
#pragma unroll
        for (int e = 0; e < 8; e++) found[e / 4][e % 4] += more[e / 4][e % 4];
        pack(found[0], found[1], u);
        add(solved[0], solved[1], u, solve);
        add(y, v, chunk.kr);
#pragma unroll
        for (int k = 0; k < WKV7_TILES / 2; k++) {
            uint32_t r[4];
            four(chunk.r[k][lane], r);
            add(y[0], y[1], state[k], r);
        }
        pack(solved[0], solved[1], u);
        uint32_t br[4];
        load(chunk.br, br);
#pragma unroll
        for (int j = 0; j < WKV7_TILES; j += 2) {
            const float4 by = *(const float4*)&chunk.after[quarter][j];
            decay[j] = make_float2(by.x, by.y), decay[j + 1] = make_float2(by.z, by.w);
        }
        add_to_state(u, chunk.b);
        add(y[0], y[1], u, br);
        if (++slot == Shared::PRODUCERS) slot = 0, parity ^= 1;
        if (!last) begin();
        __syncwarp();
        if (lane == 0) arrive_at(empty);
    }

    // Stores y of a chunk to rows of the output. `left` is the number of tokens from this lane's
    // first row on; its second row is 8 tokens later.
    __device__ void store(T* to, int left, const float (&y)[2][4]) {
        uint32_t rows[2][2];  // For both tokens: values pair and pair + 1 of both groups of eight
#pragma unroll
        for (int e = 0; e < 4; e++) rows[e / 2][e % 2] = transposed(packed<T>(WKV7_SCALE * y[e / 2][e % 2 * 2], WKV7_SCALE * y[e / 2][e % 2 * 2 + 1]));
        if (left > 0) *(uint32_t*)to = rows[0][0], *(uint32_t*)(to + 8) = rows[0][1];
        if (left > 8) *(uint32_t*)(to + 8 * p.y_row) = rows[1][0], *(uint32_t*)(to + 8 * p.y_row + 8) = rows[1][1];
    }

    __device__ void consume_all() {
        float* state = p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * WKV7_DIM * WKV7_DIM;
        load_state(state);
        T* to = (T*)p.y + ((long long)blockIdx.z * p.tokens + row) * p.y_row + blockIdx.y * WKV7_DIM + blockIdx.x * VALUES + slice * 16 + 2 * quarter;
        begin();
        for (int first = 0; first < p.tokens; first += WKV7_CHUNK, to += WKV7_CHUNK * p.y_row) {
            float y[2][4] = {};
            step(first + WKV7_CHUNK >= p.tokens, y);
            store(to, p.tokens - first - row, y);
        }
        store_state(state);
    }
};

}  // namespace hybrid

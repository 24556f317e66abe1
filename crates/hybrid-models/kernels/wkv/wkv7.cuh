// RWKV-7's recurrence (Peng and others, arXiv 2503.14456) for prompts in f32, token by token: the
// generalised delta rule, and the layer's preparation of its keys.
//
// A block processes VALUES of a head's values through all tokens. Half of its warps keep the state
// in registers: four lanes share two columns, with a quarter of their 64 keys each. The other half
// computes, once per block, the rows that are the same for all columns (decays, removal keys, keys,
// added keys) of the next tile of tokens, while its loads of the tile after that are in flight.
#pragma once
#include "../args.cuh"
#include "../number.cuh"

namespace hybrid {

constexpr int DELTA_THREADS = 128, DELTA_TILE = 8, DELTA_VALUES = 32, DELTA_DIM = 64, DELTA_QUADS = DELTA_DIM / 16;

struct DeltaTile {
    float4 r[DELTA_TILE][DELTA_DIM / 4], w[DELTA_TILE][DELTA_DIM / 4], k[DELTA_TILE][DELTA_DIM / 4];
    float4 removal[DELTA_TILE][DELTA_DIM / 4], added[DELTA_TILE][DELTA_DIM / 4];  // added: negated
    float v[DELTA_TILE][DELTA_VALUES], y[DELTA_TILE][DELTA_VALUES];
};

template <class T>
struct DeltaProducer {
    // Tokens of a tile that a warp prepares; a lane takes two adjacent keys, and one value.
    static constexpr int ROWS = DELTA_TILE / 2;

    const Wkv7& p;
    DeltaTile (&tiles)[2];
    const int warp, lane, head, first;
    const long long start;
    float2 decay, rate_bias, removal_scale, key_rate, bonus_weight;
    Bits<T> r[ROWS], key[ROWS], w[ROWS], a[ROWS];
    T v[ROWS];

    __device__ DeltaProducer(const Wkv7& p, DeltaTile (&tiles)[2])
        : p(p), tiles(tiles), warp(threadIdx.x / 32 % 2), lane(threadIdx.x % 32), head(blockIdx.y * DELTA_DIM), first(head + blockIdx.x * DELTA_VALUES),
          start((long long)blockIdx.z * p.tokens) {
        auto pair_at = [&](const float* x) { return *reinterpret_cast<const float2*>(x + head + 2 * lane); };
        decay = pair_at(p.decay), rate_bias = pair_at(p.rate_bias), removal_scale = pair_at(p.removal_scale);
        key_rate = pair_at(p.key_rate), bonus_weight = pair_at(p.bonus_weight);
    }

    // Reads the last token again in place of tokens beyond it; these are not used.
    __device__ void load(int tile) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const long long row = start + min(tile * DELTA_TILE + warp * ROWS + i, p.tokens - 1);
            auto at = [&](const void* x, int stride) { return *reinterpret_cast<const Bits<T>*>((const T*)x + row * stride + head + 2 * lane); };
            r[i] = at(p.r, p.r_row), key[i] = at(p.key, p.key_row), w[i] = at(p.w, p.w_row), a[i] = at(p.a, p.a_row);
            v[i] = ((const T*)p.v)[row * p.v_row + first + lane];
        }
    }
    __device__ void produce(int tile) {
        DeltaTile& to = tiles[tile % 2];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int t = warp * ROWS + i, token = tile * DELTA_TILE + t;
            const float2 rs = unpacked<T>(r[i]), keys = unpacked<T>(key[i]), ws = unpacked<T>(w[i]), as = unpacked<T>(a[i]);
            float2 removal = {keys.x * removal_scale.x, keys.y * removal_scale.y};
            const float2 rate = {sigmoid(as.x + rate_bias.x), sigmoid(as.y + rate_bias.y)};
            const float2 k = {keys.x * fmaf(rate.x - 1.f, key_rate.x, 1.f), keys.y * fmaf(rate.y - 1.f, key_rate.y, 1.f)};
            float norm = fmaf(removal.x, removal.x, removal.y * removal.y);
            float bonus = fmaf(rs.x * k.x, bonus_weight.x, rs.y * k.y * bonus_weight.y);
#pragma unroll
            for (int step = 1; step < 32; step *= 2) norm += __shfl_xor_sync(~0u, norm, step), bonus += __shfl_xor_sync(~0u, bonus, step);
            const float scale = 1.f / fmaxf(sqrtf(norm), 1e-12f);
            removal.x *= scale, removal.y *= scale;
            auto put = [&](float4(&rows)[DELTA_TILE][DELTA_DIM / 4], float x, float y) { ((float2*)rows[t])[lane] = make_float2(x, y); };
            put(to.r, rs.x, rs.y), put(to.k, k.x, k.y), put(to.removal, removal.x, removal.y);
            put(to.w, forget7(ws.x + decay.x), forget7(ws.y + decay.y)), put(to.added, -rate.x * removal.x, -rate.y * removal.y);
            to.v[t][lane] = number(v[i]);
            if (p.bonus && blockIdx.x == 0 && lane == 0 && token < p.tokens) p.bonus[(start + token) * p.heads + blockIdx.y] = bonus;
        }
    }
    __device__ void finish(int tile) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int t = warp * ROWS + i, token = tile * DELTA_TILE + t;
            if (token < p.tokens) ((T*)p.y)[(start + token) * p.y_row + first + lane] = rounded<T>(tiles[tile % 2].y[t][lane]);
        }
    }
};

// Two columns of the state. This lane has the keys 4 (part + 4 m) + e of each.
struct DeltaColumns {
    const int lane, part, column;
    float s[2][DELTA_QUADS][4];

    __device__ DeltaColumns() : lane(threadIdx.x % 32), part(lane / 8), column(threadIdx.x / 32 * 16 + lane % 8) {}
    template <class F>
    __device__ void each(F f) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int m = 0; m < DELTA_QUADS; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) f(s[c][m][e], (4 * (part + 4 * m) + e) * DELTA_DIM + column + 8 * c);
            }
        }
    }
    static __device__ float dot(const float (&x)[DELTA_QUADS][4], const float4 (&y)[DELTA_QUADS]) {
        float sum[DELTA_QUADS];
#pragma unroll
        for (int m = 0; m < DELTA_QUADS; m++) sum[m] = fmaf(x[m][3], y[m].w, fmaf(x[m][2], y[m].z, fmaf(x[m][1], y[m].y, x[m][0] * y[m].x)));
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    __device__ void step(DeltaTile& tile, int t) {
        auto row = [&](const float4(&rows)[DELTA_TILE][DELTA_DIM / 4], float4(&to)[DELTA_QUADS]) {
#pragma unroll
            for (int m = 0; m < DELTA_QUADS; m++) to[m] = rows[t][part + 4 * m];
        };
        float4 removal[DELTA_QUADS], w[DELTA_QUADS], k[DELTA_QUADS], added[DELTA_QUADS], r[DELTA_QUADS];
        row(tile.removal, removal), row(tile.w, w), row(tile.k, k), row(tile.added, added), row(tile.r, r);
        float found[2] = {dot(s[0], removal), dot(s[1], removal)}, y[2];
#pragma unroll
        for (int c = 0; c < 2; c++) found[c] += __shfl_xor_sync(~0u, found[c], 8);
#pragma unroll
        for (int c = 0; c < 2; c++) found[c] += __shfl_xor_sync(~0u, found[c], 16);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float v = tile.v[t][column + 8 * c];
#pragma unroll
            for (int m = 0; m < DELTA_QUADS; m++) {
                s[c][m][0] = fmaf(added[m].x, found[c], fmaf(w[m].x, s[c][m][0], k[m].x * v));
                s[c][m][1] = fmaf(added[m].y, found[c], fmaf(w[m].y, s[c][m][1], k[m].y * v));
                s[c][m][2] = fmaf(added[m].z, found[c], fmaf(w[m].z, s[c][m][2], k[m].z * v));
                s[c][m][3] = fmaf(added[m].w, found[c], fmaf(w[m].w, s[c][m][3], k[m].w * v));
            }
            y[c] = dot(s[c], r);
        }
        // Lanes of parts 0 and 1 get the first column's sum, the others the second column's.
        const bool upper = part & 2;
        float sum = (upper ? y[1] : y[0]) + __shfl_xor_sync(~0u, upper ? y[0] : y[1], 16);
        sum += __shfl_xor_sync(~0u, sum, 8);
        if (part % 2 == 0) tile.y[t][column + part * 4] = sum;
    }
};

// Grid (DELTA_DIM / DELTA_VALUES, heads, batch), DELTA_THREADS threads.
template <class T>
__device__ void wkv7(const Wkv7& p) {
    __shared__ DeltaTile tiles[2];
    const int count = (p.tokens + DELTA_TILE - 1) / DELTA_TILE;
    auto barrier = [] { asm volatile("bar.sync 0;" ::: "memory"); };
    if (threadIdx.x >= DELTA_THREADS / 2) {
        DeltaProducer<T> producer(p, tiles);
        producer.load(0);
        producer.produce(0);
        if (count > 1) producer.load(1);
        for (int tile = 0; tile < count; tile++) {
            barrier();
            // The outputs are stored before their tile is overwritten.
            if (tile > 0) producer.finish(tile - 1);
            if (tile + 1 < count) producer.produce(tile + 1);
            if (tile + 2 < count) producer.load(tile + 2);
        }
        barrier();
        producer.finish(count - 1);
        return;
    }
    float* state = p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * DELTA_DIM * DELTA_DIM + blockIdx.x * DELTA_VALUES;
    DeltaColumns columns;
    columns.each([&](float& s, int at) { s = state[at]; });
    for (int tile = 0; tile < count; tile++) {
        barrier();
        const int tokens = min(DELTA_TILE, p.tokens - tile * DELTA_TILE);
        if (tokens == DELTA_TILE) {
#pragma unroll 2
            for (int t = 0; t < DELTA_TILE; t++) columns.step(tiles[tile % 2], t);
        } else {
            for (int t = 0; t < tokens; t++) columns.step(tiles[tile % 2], t);
        }
    }
    barrier();
    columns.each([&](float& s, int at) { state[at] = s; });
}

}  // namespace hybrid

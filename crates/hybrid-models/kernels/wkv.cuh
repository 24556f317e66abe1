// The recurrence of RWKV-5 and 6 for prompts, in chunks of 16 tokens and matrix products. With W(t) the product of a chunk's decays up to
// token t and S its state before,
//
//     y(t) = (r(t) o W(t - 1)) S + sum over s <= t of A(t, s) v(s),  S <- diag(W(end)) S + sum over s of (k(s) o W(end) / W(s)) v(s)'
//     A(t, s) = r(t) . (k(s) o w(s + 1) ... w(t - 1)),  A(t, t) = r(t) . (u o k(t))
//
// No decay is ever divided by, so that any decays from 0 to 1 will do: for s < t let L be the highest bit in which they differ; then
// A(t, s) = Z(t) . Z(s) with Z(t) = r(t) o w(m) ... w(t - 1), Z(s) = k(s) o w(s + 1) ... w(m - 1) and m = t with its bits below L cleared.
// A level L takes one product Z Z'.
//
// A block takes VALUES of a head's values through all tokens. Each of four warps prepares a chunk (decays, A); meanwhile one warp for
// each 16 values goes through the four chunks before, its columns of S in f32 registers. What it multiplies with S, and adds to it, is split in
// two 16-bit numbers, so that S is as exact as f32 steps make it.
#pragma once
#include <cstddef>
#include <type_traits>
#include "args.cuh"
#include "mma.cuh"

namespace hybrid {

constexpr int HEAD = 64, WKV_CHUNK = 16, WKV_CHUNKS = 4, WKV_GROUP = WKV_CHUNKS * WKV_CHUNK, WKV_VALUES = 32;
constexpr int WKV_MAKERS = WKV_CHUNKS, WKV_WARPS = WKV_MAKERS + WKV_VALUES / 16, WKV_THREADS = 32 * WKV_WARPS;

// What is prepared of a chunk. high and low: a number's rounding and what it left over.
template <class T>
struct WkvChunk {
    __nv_bfloat16 r_high[WKV_CHUNK][HEAD + PAD], r_low[WKV_CHUNK][HEAD + PAD];  // r(t) o W(t - 1)
    T k_high[WKV_CHUNK][HEAD + PAD], k_low[WKV_CHUNK][HEAD + PAD];              // k(s) o W(end) / W(s)
    T v[WKV_CHUNK][WKV_VALUES + PAD];
    T a[WKV_CHUNK][WKV_CHUNK + PAD];
    float decay[HEAD];  // W(end)
};

template <class T>
struct WkvShared {
    WkvChunk<T> chunks[2][WKV_CHUNKS];
    T z[WKV_MAKERS][WKV_CHUNK][HEAD + PAD];
};

__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }

// Two numbers next to each other, rounded.
template <class T>
__device__ __forceinline__ void put(T* to, float2 x) {
    *reinterpret_cast<Bits<T>*>(to) = packed<T>(x.x, x.y);
}
__device__ __forceinline__ float2 load_pair(uint32_t shared_at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared_at) : "memory");
    return x;
}
template <class T>
__device__ __forceinline__ void put_split(T* high, T* low, float2 x) {
    split<T>(x.x, x.y, *reinterpret_cast<uint32_t*>(high), *reinterpret_cast<uint32_t*>(low));
}

// c += x y' of two matrices [16][HEAD] in shared memory, as fragments of 16 x 16.
template <class T>
__device__ __forceinline__ void product(float (&c)[2][4], const T (&x)[WKV_CHUNK][HEAD + PAD], const T (&y)[WKV_CHUNK][HEAD + PAD], int lane) {
    const int matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < HEAD; k += 16) {
        uint32_t a[4], b[4];
        load_matrices(a, &x[matrix % 2 * 8 + line][k + matrix / 2 * 8]);
        load_matrices(b, &y[matrix / 2 * 8 + line][k + matrix % 2 * 8]);
        multiply<T>(c[0], a, b[0], b[1]);
        multiply<T>(c[1], a, b[2], b[3]);
    }
}

template <class T, bool TOKEN_DECAYS>
struct WkvMaker {
    const Wkv& p;
    WkvShared<T>& shared;
    const int warp, lane, head;
    const long long start;
    const T *r_at, *k_at, *w_at;  // Of this lane's keys of the first token of the chunk to load
    float2 u, decay;
    Bits<T> r_next[WKV_CHUNK], k_next[WKV_CHUNK], w_next[WKV_CHUNK];

    // A lane takes two neighbouring keys.
    __device__ WkvMaker(const Wkv& p, WkvShared<T>& shared)
        : p(p), shared(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32), head(blockIdx.y * HEAD), start((long long)blockIdx.z * p.tokens) {
        u = *reinterpret_cast<const float2*>(p.u + head + 2 * lane);
        decay = *reinterpret_cast<const float2*>(p.decay + head + 2 * lane);
        const long long row = start + warp * WKV_CHUNK;
        r_at = (const T*)p.r + row * p.r_row + head + 2 * lane, k_at = (const T*)p.k + row * p.k_row + head + 2 * lane;
        w_at = (const T*)p.w + row * p.w_row + head + 2 * lane;
    }

    // Beyond the last token, it is read again.
    __device__ void load(int group) {
        const int count = p.tokens - group * WKV_GROUP - warp * WKV_CHUNK;
        if (count <= 0) return;
        auto rows = [&](const T*& at, int row, Bits<T>(&to)[WKV_CHUNK]) {
            const T* from = at;
#pragma unroll
            for (int t = 0; t < WKV_CHUNK; t++) {
                to[t] = *reinterpret_cast<const Bits<T>*>(from);
                if (t + 1 < count) from += row;
            }
            at += WKV_GROUP * row;
        };
        rows(r_at, p.r_row, r_next);
        rows(k_at, p.k_row, k_next);
        if (TOKEN_DECAYS) rows(w_at, p.w_row, w_next);
    }

    // Values of a group, by all makers.
    __device__ void copy_values(int group) {
        for (int i = threadIdx.x; i < WKV_GROUP * WKV_VALUES / 8; i += 32 * WKV_MAKERS) {
            const int t = i / (WKV_VALUES / 8), at = i % (WKV_VALUES / 8) * 8, token = group * WKV_GROUP + t;
            const T* from = (const T*)p.v + (start + min(token, p.tokens - 1)) * p.v_row + head + blockIdx.x * WKV_VALUES + at;
            copy16(&shared.chunks[group % 2][t / WKV_CHUNK].v[t % WKV_CHUNK][at], from, token < p.tokens);
        }
        end_copies();
    }

    // The places of A that are of this level.
    template <int LEVEL>
    __device__ void weigh(const float2 (&r)[WKV_CHUNK], const float2 (&k)[WKV_CHUNK], const float2 (&w)[WKV_CHUNK], float (&a)[2][4]) {
        auto& z = shared.z[warp];
        __syncwarp();
#pragma unroll
        for (int middle = LEVEL; middle < WKV_CHUNK; middle += 2 * LEVEL) {
            float2 before = {1.f, 1.f}, after = {1.f, 1.f};
#pragma unroll
            for (int i = 0; i < LEVEL; i++) {
                put(&z[middle + i][2 * lane], r[middle + i] * before);
                before = before * w[middle + i];
                put(&z[middle - 1 - i][2 * lane], k[middle - 1 - i] * after);
                after = after * w[middle - 1 - i];
            }
        }
        __syncwarp();
        float both[2][4] = {};
        product<T>(both, z, z, lane);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int t = lane / 4 + e % 4 / 2 * 8, s = lane % 4 * 2 + e % 2 + e / 4 * 8;
            if (s < t && (t ^ s) >= LEVEL && (t ^ s) < 2 * LEVEL) a[e / 4][e % 4] = both[e / 4][e % 4];
        }
    }

    // FULL: no token of the chunk lies beyond the last.
    template <bool FULL>
    __device__ void make(int group) {
        const int t0 = group * WKV_GROUP + warp * WKV_CHUNK;
        WkvChunk<T>& chunk = shared.chunks[group % 2][warp];
        float2 r[WKV_CHUNK], k[WKV_CHUNK], w[WKV_CHUNK];
        float own[WKV_CHUNK];
        const float2 one = {1.f, 1.f}, none = {0.f, 0.f};
#pragma unroll
        for (int t = 0; t < WKV_CHUNK; t++) {
            r[t] = unpacked<T>(r_next[t]), k[t] = unpacked<T>(k_next[t]), w[t] = decay;
            if (TOKEN_DECAYS) {
                const float2 x = unpacked<T>(w_next[t]);
                w[t] = make_float2(forget6(x.x + decay.x), forget6(x.y + decay.y));
            }
        }
        load(group + 1);
        // Tokens beyond the last change nothing.
        if (!FULL) {
#pragma unroll
            for (int t = 0; t < WKV_CHUNK; t++) {
                if (t0 + t >= p.tokens) r[t] = k[t] = none, w[t] = one;
            }
        }
#pragma unroll
        for (int t = 0; t < WKV_CHUNK; t++) own[t] = fmaf(r[t].x * u.x, k[t].x, r[t].y * u.y * k[t].y);

        float2 before = one, after = one;
#pragma unroll
        for (int t = 0; t < WKV_CHUNK; t++) {
            put_split(&chunk.r_high[t][2 * lane], &chunk.r_low[t][2 * lane], r[t] * before);
            before = before * w[t];
            const int s = WKV_CHUNK - 1 - t;
            put_split(&chunk.k_high[s][2 * lane], &chunk.k_low[s][2 * lane], k[s] * after);
            after = after * w[s];
        }
        *reinterpret_cast<float2*>(&chunk.decay[2 * lane]) = before;

        // A's places of this lane: tokens row and row + 8, of the tokens before them pair and pair + 1 in each half.
        const int row = lane / 4, pair = lane % 4 * 2;
        float own_sum = sums_of_lanes<WKV_CHUNK>(own, lane);
        own_sum += __shfl_xor_sync(~0u, own_sum, 16);
        const float own_of[2] = {__shfl_sync(~0u, own_sum, row), __shfl_sync(~0u, own_sum, row + 8)};
        float a[2][4];
#pragma unroll
        for (int e = 0; e < 8; e++) a[e / 4][e % 4] = row + e % 4 / 2 * 8 == pair + e % 2 + e / 4 * 8 ? own_of[e % 4 / 2] : 0.f;
        weigh<8>(r, k, w, a), weigh<4>(r, k, w, a), weigh<2>(r, k, w, a), weigh<1>(r, k, w, a);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            put(&chunk.a[row][half * 8 + pair], make_float2(a[half][0], a[half][1]));
            put(&chunk.a[row + 8][half * 8 + pair], make_float2(a[half][2], a[half][3]));
        }
    }
};

// 16 columns of S, transposed: fragments C of [values][keys], eight keys a tile. Packed in pairs they are fragments A of S' and B of S, too.
template <class T>
struct WkvUser {
    // bf16 outputs are no more exact than r rounded to bf16.
    static constexpr bool SPLIT_R = !std::is_same<T, __nv_bfloat16>::value;
    const int lane, row, pair, first;
    float s[HEAD / 8][4];

    __device__ WkvUser(int first) : lane(threadIdx.x % 32), row(lane / 4), pair(lane % 4 * 2), first(first) {}

    __device__ void load_state(const float* state) {
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = state[(j * 8 + pair + e % 2) * HEAD + first + row + e / 2 * 8];
        }
    }
    __device__ void store_state(float* state) {
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) state[(j * 8 + pair + e % 2) * HEAD + first + row + e / 2 * 8] = s[j][e];
        }
    }

    // y (tokens x values) of the chunk at this shared address, and S after it. `value`: where the 16 values lie in the chunk's.
    __device__ void chunk(uint32_t at, int value, float (&y)[2][4]) {
        typedef WkvChunk<T> Chunk;
        // A lane's row of matrices 16 numbers wide, in rows of so many bytes.
        auto place = [&](int bytes) { return at + (lane / 8 % 2 * 8 + lane % 8) * bytes + lane / 16 * 16; };
        const uint32_t rows = place(sizeof(Chunk::r_high[0]));
        uint32_t a[4], v[4];
        load_matrices(a, place(sizeof(Chunk::a[0])) + offsetof(Chunk, a));
        load_transposed(v, place(sizeof(Chunk::v[0])) + offsetof(Chunk, v) + 2 * value);
        const uint32_t v_transposed[4] = {v[0], v[2], v[1], v[3]};
        const uint32_t decays = at + offsetof(Chunk, decay) + 4 * pair;
        // Sums apart, so that products need not wait for one another.
        float part[2][2][4] = {};
        multiply<T>(y[0], a, v[0], v[1]);
        multiply<T>(y[1], a, v[2], v[3]);
#pragma unroll
        for (int k = 0; k < HEAD / 16; k++) {
            uint32_t r_high[4], r_low[4], k_high[4], k_low[4];
            load_matrices(r_high, rows + offsetof(Chunk, r_high) + 32 * k);
            load_transposed(k_high, rows + offsetof(Chunk, k_high) + 32 * k);
            load_transposed(k_low, rows + offsetof(Chunk, k_low) + 32 * k);
            if (SPLIT_R) load_matrices(r_low, rows + offsetof(Chunk, r_low) + 32 * k);
            uint32_t high[2][2], low[2][2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float(&tile)[4] = s[2 * k + e];
                split<__nv_bfloat16>(tile[0], tile[1], high[0][e], low[0][e]);
                split<__nv_bfloat16>(tile[2], tile[3], high[1][e], low[1][e]);
                const float2 decay = load_pair(decays + (2 * k + e) * 32);
                tile[0] *= decay.x, tile[1] *= decay.y, tile[2] *= decay.x, tile[3] *= decay.y;
                multiply<T>(tile, v_transposed, k_high[2 * e], k_high[2 * e + 1]);
                multiply<T>(tile, v_transposed, k_low[2 * e], k_low[2 * e + 1]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                multiply<__nv_bfloat16>(y[n], r_high, high[n][0], high[n][1]);
                multiply<__nv_bfloat16>(part[0][n], r_high, low[n][0], low[n][1]);
                if (SPLIT_R) multiply<__nv_bfloat16>(part[1][n], r_low, high[n][0], high[n][1]);
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) y[e / 4][e % 4] += part[0][e / 4][e % 4] + part[1][e / 4][e % 4];
    }
};

// Grid (HEAD / WKV_VALUES, heads, batch), WKV_THREADS threads, WkvShared<T> bytes of dynamic shared memory.
template <class T, bool TOKEN_DECAYS>
__device__ void wkv(const Wkv& p) {
    extern __shared__ __align__(16) char memory[];
    WkvShared<T>& shared = *(WkvShared<T>*)memory;
    const int warp = threadIdx.x / 32, groups = (p.tokens + WKV_GROUP - 1) / WKV_GROUP;
    // Between two barriers, the makers fill one half of the chunks and the users empty the other.
    if (warp < WKV_MAKERS) {
        WkvMaker<T, TOKEN_DECAYS> maker(p, shared);
        maker.load(0);
        for (int group = 0; group < groups; group++) {
            maker.copy_values(group);
            const int count = p.tokens - group * WKV_GROUP - warp * WKV_CHUNK;
            if (count >= WKV_CHUNK) maker.template make<true>(group);
            else if (count > 0) maker.template make<false>(group);
            await_copies<0>();
            asm volatile("bar.sync 0;" ::: "memory");
        }
        return;
    }
    const int value = (warp - WKV_MAKERS) * 16, first = blockIdx.x * WKV_VALUES + value;
    float* state = p.state + ((long long)blockIdx.z * p.heads + blockIdx.y) * HEAD * HEAD;
    WkvUser<T> user(first);
    user.load_state(state);
    int left = p.tokens - user.row;  // Tokens from this lane's first row of the chunk on; its second row is 8 further.
    T* to = (T*)p.y + ((long long)blockIdx.z * p.tokens + user.row) * p.y_row + blockIdx.y * HEAD + first + user.pair;
    const int below = 8 * p.y_row;
    for (int group = 0; group < groups; group++) {
        asm volatile("bar.sync 0;" ::: "memory");
        const int chunks = min(WKV_CHUNKS, (p.tokens - group * WKV_GROUP + WKV_CHUNK - 1) / WKV_CHUNK);
        uint32_t at = shared_address(&shared.chunks[group % 2][0]);
        for (int i = 0; i < chunks; i++, at += sizeof(WkvChunk<T>), left -= WKV_CHUNK, to += 2 * below) {
            float y[2][4] = {};
            user.chunk(at, value, y);
            if (left > 0) put(to, make_float2(y[0][0], y[0][1])), put(to + 8, make_float2(y[1][0], y[1][1]));
            if (left > 8) put(to + below, make_float2(y[0][2], y[0][3])), put(to + below + 8, make_float2(y[1][2], y[1][3]));
        }
    }
    user.store_state(state);
}

template <class T>
__device__ void wkv5(const Wkv& p) { wkv<T, false>(p); }
template <class T>
__device__ void wkv6(const Wkv& p) { wkv<T, true>(p); }

}  // namespace hybrid

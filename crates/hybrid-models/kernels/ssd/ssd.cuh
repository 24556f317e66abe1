// Mamba-2's recurrence for prompts, in chunks of matrix products: the state space duality of Dao
// and Gu, arXiv 2405.21060, section 6. With s(t) the sum of dt a up to token t of a chunk and H the
// state before the chunk,
//
//     Y = (L o C B') X + e^s o (C H) + D X,  L(t, u) = e^(s(t) - s(u)) dt(u) for u <= t,
//     H <- e^s(end) H + B' (e^(s(end) - s) dt o X)
//
// No exponent is positive. A block processes COLUMNS of a head's channels through all tokens. Four
// warps compute outputs, 16 tokens each, from a 16-bit copy of the state. Four other warps compute
// the state after the chunk in f32 registers, a quarter of its rows each. Meanwhile the next chunk
// is copied. This kernel is for devices without wgmma; for others, see ssd_wgmma.cuh.
#pragma once
#include "../args.cuh"
#include "../mma.cuh"

namespace hybrid {

constexpr int SSD_THREADS = 256, SSD_CHUNK = 64, SSD_COLUMNS = 32, SSD_DIM = 64;

template <class T, int N>
struct SsdShared {
    T b[2][SSD_CHUNK][N + PAD], c[2][SSD_CHUNK][N + PAD];
    T x[2][SSD_CHUNK][SSD_COLUMNS + PAD];
    T state[2][N][SSD_COLUMNS + PAD];
    float2 sums[2][SSD_CHUNK];  // s in units of ln 2, and dt
    float state_weights[2][SSD_CHUNK];  // e^(s(end) - s) dt: those of X in the next state
    float decay[2];                     // e^s(end)
};

template <class T, int N>
struct SsdBlock {
    const Ssd& p;
    SsdShared<T, N>& shared;
    const int head, first, warp, lane, row, pair;  // first: the block's first column of the head
    const long long start;
    // Rows are copied with 16 bytes per thread. x, b and c are this thread's part of the next chunk
    // to copy.
    static constexpr int PIECES = N / 8, ROWS = SSD_THREADS / PIECES, X_PIECES = SSD_COLUMNS / 8;
    static_assert(SSD_THREADS / X_PIECES == SSD_CHUNK, "x takes one round");
    const T *x, *b, *c;

    __device__ SsdBlock(const Ssd& p, SsdShared<T, N>& shared)
        : p(p), shared(shared), head(blockIdx.y), first(blockIdx.x * SSD_COLUMNS), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32),
          row(lane / 4), pair(lane % 4 * 2), start((long long)blockIdx.z * p.tokens) {
        const int group = head / (p.heads / p.groups);
        const long long row = start + threadIdx.x / PIECES, x_row = start + threadIdx.x / X_PIECES;
        x = (const T*)p.x + x_row * p.x_row + head * SSD_DIM + first + threadIdx.x % X_PIECES * 8;
        b = (const T*)p.b + row * p.b_row + group * N + threadIdx.x % PIECES * 8;
        c = (const T*)p.c + row * p.c_row + group * N + threadIdx.x % PIECES * 8;
    }

    __device__ int chunks() const { return (p.tokens + SSD_CHUNK - 1) / SSD_CHUNK; }

    // Copies chunk i, with all threads. Rows beyond the last token become zeros.
    __device__ void copy(int i) {
        const int stage = i % 2, left = p.tokens - i * SSD_CHUNK, at = threadIdx.x % PIECES * 8;
#pragma unroll
        for (int t = threadIdx.x / PIECES, j = 0; j < SSD_CHUNK / ROWS; j++, t += ROWS) {
            copy16(&shared.b[stage][t][at], b, t < left);
            copy16(&shared.c[stage][t][at], c, t < left);
            b += ROWS * p.b_row, c += ROWS * p.c_row;
        }
        const int t = threadIdx.x / X_PIECES;
        copy16(&shared.x[stage][t][threadIdx.x % X_PIECES * 8], x, t < left);
        x += SSD_CHUNK * p.x_row;
        end_copies();
    }

    // Steps of a chunk; a lane has two tokens.
    T steps[2];
    __device__ void load_steps(int i) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const long long t = min(i * SSD_CHUNK + 2 * lane + j, p.tokens - 1);
            steps[j] = ((const T*)p.steps)[(start + t) * p.steps_row + head];
        }
    }
    // Computes dt and its sums in chunk i, with one warp.
    __device__ void time_steps(int i) {
        const double a = (double)p.a[head] * LOG2_E;
        float dt[2];
        double sum[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float step = softplus(number(steps[j]) + p.bias[head]);
            dt[j] = i * SSD_CHUNK + 2 * lane + j < p.tokens ? fminf(fmaxf(step, p.step_min), p.step_max) : 0.f;
            sum[j] = a * dt[j];
        }
        sum[1] += sum[0];
        double before = sum[1];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const double other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
        }
        const double end = __shfl_sync(~0u, before, 31);
        before -= sum[1];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const double s = before + sum[j];
            shared.sums[i % 2][2 * lane + j] = make_float2((float)s, dt[j]);
            shared.state_weights[i % 2][2 * lane + j] = exp2_of((float)(end - s)) * dt[j];
        }
        if (lane == 0) shared.decay[i % 2] = exp2_of((float)end);
    }

    // Computes C H and, for the first 16 TILES_OF_16 tokens of the chunk, C B'. There are no
    // branches, so that loads run ahead of products.
    template <int TILES_OF_16>
    __device__ void products(int stage, int t0, float (&y)[SSD_COLUMNS / 8][4], float (&weights)[SSD_CHUNK / 8][4]) {
        const int matrix = lane / 8, line = lane % 8;
#pragma unroll
        for (int k = 0; k < N; k += 16) {
            uint32_t c_of[4], h[SSD_COLUMNS / 16][4], b_of[TILES_OF_16][4];
            load_matrices(c_of, &shared.c[stage][t0 + matrix % 2 * 8 + line][k + matrix / 2 * 8]);
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 16; j++) load_transposed(h[j], &shared.state[stage][k + matrix % 2 * 8 + line][j * 16 + matrix / 2 * 8]);
#pragma unroll
            for (int u = 0; u < TILES_OF_16; u++) load_matrices(b_of[u], &shared.b[stage][u * 16 + matrix / 2 * 8 + line][k + matrix % 2 * 8]);
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 16; j++) {
                multiply<T>(y[2 * j], c_of, h[j][0], h[j][1]);
                multiply<T>(y[2 * j + 1], c_of, h[j][2], h[j][3]);
            }
#pragma unroll
            for (int u = 0; u < TILES_OF_16; u++) {
                multiply<T>(weights[2 * u], c_of, b_of[u][0], b_of[u][1]);
                multiply<T>(weights[2 * u + 1], c_of, b_of[u][2], b_of[u][3]);
            }
        }
    }

    // Computes the outputs of chunk i in the first four warps, 16 tokens each.
    __device__ void outputs(int i) {
        const int stage = i % 2, t0 = warp * 16;
        const int matrix = lane / 8, line = lane % 8;
        float y[SSD_COLUMNS / 8][4] = {}, weights[SSD_CHUNK / 8][4] = {};
        if (warp < 2) products<2>(stage, t0, y, weights);
        else products<4>(stage, t0, y, weights);
        const int t[2] = {t0 + row, t0 + row + 8};
        const float s[2] = {shared.sums[stage][t[0]].x, shared.sums[stage][t[1]].x};
        const float decay[2] = {exp2_of(s[0]), exp2_of(s[1])};
#pragma unroll
        for (int j = 0; j < SSD_COLUMNS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) y[j][e] *= decay[e / 2];
        }
#pragma unroll
        for (int u0 = 0; u0 < SSD_CHUNK; u0 += 16) {
            if (u0 > t0) break;
            uint32_t w[4], x_of[SSD_COLUMNS / 16][4];
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 16; j++) load_transposed(x_of[j], &shared.x[stage][u0 + matrix % 2 * 8 + line][j * 16 + matrix / 2 * 8]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int u = u0 + half * 8 + pair;
                const float4 at = *reinterpret_cast<const float4*>(&shared.sums[stage][u]);
                const float(&product)[4] = weights[u0 / 8 + half];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float first = product[2 * e] * exp2_of(s[e] - at.x) * at.y, second = product[2 * e + 1] * exp2_of(s[e] - at.z) * at.w;
                    w[half * 2 + e] = packed<T>(u <= t[e] ? first : 0.f, u + 1 <= t[e] ? second : 0.f);
                }
            }
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 16; j++) {
                multiply<T>(y[2 * j], w, x_of[j][0], x_of[j][1]);
                multiply<T>(y[2 * j + 1], w, x_of[j][2], x_of[j][3]);
            }
        }
        const float d = p.d[head];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = i * SSD_CHUNK + t[e];
            if (token >= p.tokens) continue;
            T* to = (T*)p.y + (start + token) * p.y_row + head * SSD_DIM + first + pair;
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 8; j++) {
                const float2 x_of = unpacked<T>(*reinterpret_cast<const uint32_t*>(&shared.x[stage][t[e]][j * 8 + pair]));
                *reinterpret_cast<uint32_t*>(to + j * 8) = packed<T>(fmaf(d, x_of.x, y[j][2 * e]), fmaf(d, x_of.y, y[j][2 * e + 1]));
            }
        }
    }

    // The state, in the last four warps: a quarter of its rows each.
    static constexpr int TILES = N / 64;
    float h[TILES][SSD_COLUMNS / 8][4];

    __device__ float* state_at(int tile, int j, int e) const {
        const int n = (warp * TILES + tile) * 16 + row + e * 8;
        return p.state + (((long long)blockIdx.z * p.heads + head) * N + n) * SSD_DIM + first + j * 8 + pair;
    }
    template <class F>
    __device__ void each_pair(F f) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) f(tile, j, e);
            }
        }
    }
    __device__ void load_state() {
        each_pair([&](int tile, int j, int e) {
            const float2 both = *reinterpret_cast<const float2*>(state_at(tile, j, e));
            h[tile][j][2 * e] = both.x, h[tile][j][2 * e + 1] = both.y;
        });
        share_state(0);
    }
    __device__ void store_state() {
        each_pair([&](int tile, int j, int e) {
            *reinterpret_cast<float2*>(state_at(tile, j, e)) = make_float2(h[tile][j][2 * e], h[tile][j][2 * e + 1]);
        });
    }
    // Stores the 16-bit copy of the state for the outputs of chunk i.
    __device__ void share_state(int i) {
        each_pair([&](int tile, int j, int e) {
            T* to = &shared.state[i % 2][(warp * TILES + tile) * 16 + row + e * 8][j * 8 + pair];
            *reinterpret_cast<uint32_t*>(to) = packed<T>(h[tile][j][2 * e], h[tile][j][2 * e + 1]);
        });
    }
    __device__ void update_state(int i) {
        const int stage = i % 2, matrix = lane / 8, line = lane % 8;
        const float decay = shared.decay[stage];
        each_pair([&](int tile, int j, int e) { h[tile][j][2 * e] *= decay, h[tile][j][2 * e + 1] *= decay; });
#pragma unroll
        for (int u = 0; u < SSD_CHUNK; u += 16) {
            uint32_t x_of[SSD_COLUMNS / 16][4], b_of[TILES][4];
#pragma unroll
            for (int j = 0; j < SSD_COLUMNS / 16; j++) {
                load_transposed(x_of[j], &shared.x[stage][u + matrix % 2 * 8 + line][j * 16 + matrix / 2 * 8]);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 weight = *reinterpret_cast<const float2*>(&shared.state_weights[stage][u + e % 2 * 8 + pair]), both = unpacked<T>(x_of[j][e]);
                    x_of[j][e] = packed<T>(both.x * weight.x, both.y * weight.y);
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                load_transposed(b_of[tile], &shared.b[stage][u + matrix / 2 * 8 + line][(warp * TILES + tile) * 16 + matrix % 2 * 8]);
#pragma unroll
                for (int j = 0; j < SSD_COLUMNS / 8; j++) multiply<T>(h[tile][j], b_of[tile], x_of[j / 2][j % 2 * 2], x_of[j / 2][j % 2 * 2 + 1]);
            }
        }
        share_state(i + 1);
    }

    // Waits until all threads see chunk i and the state before it, and starts the copy of chunk i
    // + 1.
    __device__ void begin(int i) {
        await_copies<0>();
        __syncthreads();
        if (i + 1 < chunks()) copy(i + 1);
    }
    __device__ void run() {
        copy(0);
        if (threadIdx.x < SSD_THREADS / 2) {
            for (int i = 0; i < chunks(); i++) begin(i), outputs(i);
            return;
        }
        const bool computes_steps = warp == 3;
        if (computes_steps) load_steps(0), time_steps(0);
        load_state();
        for (int i = 0; i < chunks(); i++) {
            begin(i);
            if (computes_steps) load_steps(i + 1);
            update_state(i);
            if (computes_steps) time_steps(i + 1);
        }
        store_state();
    }
};

// Grid (SSD_DIM / SSD_COLUMNS, heads, batch), SSD_THREADS threads, SsdShared<T, states> bytes of
// dynamic shared memory.
template <class T>
__device__ void ssd(const Ssd& p) {
    extern __shared__ __align__(16) char memory[];
    if (p.states == 64) SsdBlock<T, 64>(p, *(SsdShared<T, 64>*)memory).run();
    else SsdBlock<T, 128>(p, *(SsdShared<T, 128>*)memory).run();
}

}  // namespace hybrid

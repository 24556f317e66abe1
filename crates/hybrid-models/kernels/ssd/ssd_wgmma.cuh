// Mamba-2's recurrence for prompts as in ssd.cuh, on devices with wgmma. A block processes a whole
// head through all tokens, transposed:
//
//     Y' = e^s o (H' C') + X' W',
//     W(t, u) = (C B')(t, u) e^(s(t) - s(u)) dt(u) for u <= t, plus D on the diagonal,
//     H' <- e^s(end) H' + (e^(s(end) - s) dt o X)' B
//
// The state stays in the f32 registers of one warp group, 16 channels per warp. Rounded to 16 bits,
// it is a register operand there, so it needs no copy in shared memory, and B, C and W are read
// once. The blocks of a cluster share their group's tiles (ssd_group_tiles.cuh). The first warp
// group multiplies. The second computes the weights of the next chunk. The warps of the third copy
// group tiles, compute the time steps, and copy x and y. There is one barrier per chunk.
#pragma once
#include "ssd_group_tiles.cuh"

namespace hybrid {

constexpr int SSD_WGMMA_THREADS = 384, SSD_CLUSTER = 2, SSD_WIDTH = 64;

struct alignas(16) SsdSums {
    float s[SSD_TOKENS];             // In units of ln 2
    float from[SSD_TOKENS];          // s - log2 dt
    float exp_s[SSD_TOKENS];         // e^s
    float state_weight[SSD_TOKENS];  // e^(s(end) - s) dt
    float decay, skip;               // e^s(end), D
};

template <class T, int N>
struct SsdWgmmaShared {
    SsdGroupTiles<T, N> group_tiles[3];
    Square<T> x[3], weights[2];  // y overwrites x: each warp has read the channels that it writes
    SsdSums sums[3];
    uint32_t steps[4][SSD_TOKENS];
    // Of the group tiles. full: the bytes have arrived; free: all blocks of the cluster have used
    // the previous ones
    uint64_t full[3], free[3];
};

// A thread block as one thread sees it. Everywhere i is a chunk. Its tiles, x and sums are in slot
// i % 3, its weights in slot i % 2.
template <class T, int N>
struct SsdHead {
    const Ssd& p;
    SsdWgmmaShared<T, N>& shared;
    // warp: in its group; matrix, line: the row whose address the lane gives
    const int warp, lane, row, pair, matrix, line, chunks;
    const long long start;
    int head;
    bool extra;  // Beyond the group's heads: takes part in the cluster, but writes nothing
    const SsdGroupTiles<T, N>* group_tiles;

    __device__ SsdHead(const Ssd& p, SsdWgmmaShared<T, N>& shared)
        : p(p), shared(shared), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), row(lane / 4), pair(lane % 4 * 2), matrix(lane / 8),
          line(lane % 8), chunks((p.tokens + SSD_TOKENS - 1) / SSD_TOKENS), start((long long)blockIdx.y * p.tokens) {
        const int heads = p.heads / p.groups, blocks = gridDim.x / p.groups, group = blockIdx.x / blocks, index = blockIdx.x % blocks;
        head = group * heads + min(index, heads - 1), extra = index >= heads;
        group_tiles = ssd_group_tiles_of<T, N>(p, blockIdx.y, group, chunks);
    }

    // ---- Group tiles: each block of the cluster copies a part of them to all blocks ----
    __device__ void copy_group_tiles(int i) {
        constexpr int PART = sizeof(SsdGroupTiles<T, N>) / SSD_CLUSTER;
        const int place = i % 3, part = blockIdx.x % SSD_CLUSTER * PART;
        if (i >= 3) {
            for (int block = 0; block < SSD_CLUSTER; block++) arrive_in(&shared.free[place], block);
            await_barrier(&shared.free[place], (i / 3 - 1) % 2);
        }
        expect(&shared.full[place], sizeof(SsdGroupTiles<T, N>));
        copy_to_blocks((char*)&shared.group_tiles[place] + part, (const char*)&group_tiles[i + 1] + part, PART, &shared.full[place], (1 << SSD_CLUSTER) - 1);
    }
    __device__ void copy_all_group_tiles() {
        if (lane == 0) {
            copy_group_tiles(0);
            if (chunks > 1) copy_group_tiles(1);
        }
        __syncthreads();
        for (int i = 0; i < chunks; i++) {
            __syncthreads();
            if (lane == 0 && i + 2 < chunks) copy_group_tiles(i + 2);
            __syncwarp();
        }
        __syncthreads();
    }

    // ---- Time steps: two tokens per lane, copied asynchronously, so that no register waits for a
    // load ----
    __device__ const T* step_at(int t) const { return (const T*)p.steps + (start + min(t, p.tokens - 1)) * p.steps_row + head; }
    // cp.async copies 4 bytes. At an odd position, the number is the second half of them. At an
    // even position, only 2 bytes are read, so nothing after the number is read.
    __device__ static bool odd(const T* at) { return (uint64_t)at & 2; }
    __device__ void copy_steps(int i) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const T* from = step_at(i * SSD_TOKENS + 2 * lane + j);
            copy4(&shared.steps[i % 4][2 * lane + j], from - odd(from), odd(from) ? 4 : 2);
        }
        end_copies();
    }
    __device__ void sum_steps(int i, float a, float bias, float d) {
        const uint2 words = *(const uint2*)&shared.steps[i % 4][2 * lane];
        float dt[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int t = i * SSD_TOKENS + 2 * lane + j;
            const float2 both = unpacked<T>(j ? words.y : words.x);
            const float step = softplus((odd(step_at(t)) ? both.y : both.x) + bias);
            dt[j] = t < p.tokens ? fminf(fmaxf(step, p.step_min), p.step_max) : 0.f;
        }
        const float sums[2] = {a * dt[0], a * dt[1]};
        float sum = sums[0] + sums[1];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        const float end = __shfl_sync(~0u, sum, 31), s[2] = {sum - sums[1], sum};
        SsdSums& to = shared.sums[i % 3];
        ((float2*)to.s)[lane] = make_float2(s[0], s[1]);
        ((float2*)to.from)[lane] = make_float2(s[0] - __log2f(dt[0]), s[1] - __log2f(dt[1]));
        ((float2*)to.exp_s)[lane] = make_float2(exp2_of(s[0]), exp2_of(s[1]));
        ((float2*)to.state_weight)[lane] = make_float2(exp2_of(end - s[0]) * dt[0], exp2_of(end - s[1]) * dt[1]);
        if (lane == 0) to.decay = exp2_of(end), to.skip = d;
    }
    __device__ void sum_all_steps() {
        const float a = p.a[head] * LOG2_E, bias = p.bias[head], d = p.d[head];
        for (int i = 0; i < 4; i++) copy_steps(i);
        await_copies<2>();
        __syncwarp();
        for (int i = 0; i < 2; i++) sum_steps(i, a, bias, d);
        __syncthreads();
        for (int i = 0; i < chunks; i++) {
            __syncthreads();
            if (i + 2 >= chunks) continue;
            copy_steps(i + 4);
            await_copies<2>();
            __syncwarp();
            sum_steps(i + 2, a, bias, d);
        }
        __syncthreads();
    }

    // ---- Copies of x and y, by two warps ----
    static constexpr int COPY_THREADS = 64, ROWS = COPY_THREADS / 8, TIMES = SSD_TOKENS / ROWS;
    __device__ void copy_x(int i, int t, int piece, const T*& x) {
        if (i < chunks) {
            const int left = p.tokens - i * SSD_TOKENS;
#pragma unroll
            for (int j = 0; j < TIMES; j++, t += ROWS) {
                copy16(&shared.x[i % 3][swizzled(t, piece)], x, t < left);
                x += ROWS * p.x_row;
            }
        }
        end_copies();
    }
    __device__ void store_y(int i, int t, int piece, T*& y) {
        const int left = extra ? 0 : p.tokens - i * SSD_TOKENS;
        uint4 of[TIMES];
#pragma unroll
        for (int j = 0; j < TIMES; j++) of[j] = *reinterpret_cast<const uint4*>(&shared.x[i % 3][swizzled(t + j * ROWS, piece)]);
#pragma unroll
        for (int j = 0; j < TIMES; j++) {
            if (t + j * ROWS < left) *reinterpret_cast<uint4*>(y) = of[j];
            y += ROWS * p.y_row;
        }
    }
    __device__ void copy_inputs_and_outputs() {
        const int t = threadIdx.x % COPY_THREADS / 8, piece = threadIdx.x % 8, column = head * SSD_WIDTH + piece * 8;
        const T* x = (const T*)p.x + (start + t) * p.x_row + column;
        T* y = (T*)p.y + (start + t) * p.y_row + column;
        copy_x(0, t, piece, x), copy_x(1, t, piece, x);
        __syncthreads();
        for (int i = 0; i < chunks; i++) {
            await_copies<1>();
            __syncthreads();
            if (i > 0) store_y(i - 1, t, piece, y);
            copy_x(i + 2, t, piece, x);
        }
        __syncthreads();
        store_y(chunks - 1, t, piece, y);
    }

    // ---- Weights: each lane has four adjacent elements in each of five half tiles ----
    int t_of[5], u_of[5];
    __device__ void begin_weights() {
#pragma unroll
        for (int j = 0; j < 5; j++) {
            const int half = warp * 5 + j, tile = half / 2, t = (tile >= 1) + (tile >= 3) + (tile >= 6);
            t_of[j] = t * 16 + half % 2 * 8 + lane / 4, u_of[j] = (tile - ssd_tile(t, 0)) * 16 + lane % 4 * 4;
        }
        // The other tiles stay zero.
        for (int i = threadIdx.x % 128; i < sizeof(shared.weights) / 16; i += 128) ((uint4*)shared.weights)[i] = make_uint4(0, 0, 0, 0);
    }
    __device__ void compute_weights(int i, const float (*scores)[16 * 16]) {
        const SsdSums& sums = shared.sums[i % 3];
        const float skip = sums.skip;
        float4 score[5];
        float s[5];
        uint2 w[5];
#pragma unroll
        for (int j = 0; j < 5; j++) {
            score[j] = *reinterpret_cast<const float4*>(scores[0] + (warp * 5 + j) * 128 + lane * 4);
            s[j] = sums.s[t_of[j]];
        }
#pragma unroll
        for (int j = 0; j < 5; j++) {
            const int diagonal = t_of[j] - u_of[j];
            const float4 from = *reinterpret_cast<const float4*>(&sums.from[u_of[j]]);
            // Above the diagonal, scores are 0, and exponents could overflow.
            auto weight = [&](float score, float from, int e) {
                return fmaf(score, exp2_of(fminf(s[j] - from, 126.f)), diagonal == e ? skip : 0.f);
            };
            w[j].x = packed<T>(weight(score[j].x, from.x, 0), weight(score[j].y, from.y, 1));
            w[j].y = packed<T>(weight(score[j].z, from.z, 2), weight(score[j].w, from.w, 3));
        }
#pragma unroll
        for (int j = 0; j < 5; j++) {
            *reinterpret_cast<uint2*>(&shared.weights[i % 2][swizzled(t_of[j], u_of[j] / 8) + u_of[j] % 8]) = w[j];
        }
        share_with_wgmma();
    }
    __device__ void weigh_all() {
        begin_weights();
        __syncthreads();
        compute_weights(0, group_tiles[0].scores);
        for (int i = 0; i < chunks; i++) {
            await_barrier(&shared.full[i % 3], i / 3 % 2);
            __syncthreads();
            if (i + 1 < chunks) compute_weights(i + 1, shared.group_tiles[i % 3].scores);
        }
        __syncthreads();
    }

    // ---- Products ----
    float h[N / 64][32];
    uint32_t narrow[N / 16][4], x[4][4], scaled[4][4];
    float2 state_weight[8], exp_s[8];

    __device__ float* state_at(int half, int e) const {
        const int n = half * 64 + e / 4 * 8 + pair + e % 2, channel = warp * 16 + row + e / 2 % 2 * 8;
        return p.state + (((long long)blockIdx.y * p.heads + head) * N + n) * SSD_WIDTH + channel;
    }
    // Rounds the state before chunk i to the operand of its outputs, then multiplies it by the
    // chunk's decay.
    __device__ void leave(int i) {
        const float decay = i < chunks ? shared.sums[i % 3].decay : 1.f;
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float &first = h[k / 4][k % 4 * 8 + e * 2], &second = h[k / 4][k % 4 * 8 + e * 2 + 1];
                narrow[k][e] = packed<T>(first, second);
                first *= decay, second *= decay;
            }
        }
    }
    __device__ void read_state(int i, float (&y)[32]) {
        const uint32_t c = descriptor(shared.group_tiles[i % 3].c);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < N / 16; k++) wgmma<T, false>(y, narrow[k], c + k / 4 * 512 + k % 4 * 2, k > 0);
        wgmma_end();
    }
    __device__ void add_to_state(int i) {
        const uint32_t b = descriptor(shared.group_tiles[i % 3].b);
        wgmma_begin();
#pragma unroll
        for (int half = 0; half < N / 64; half++) {
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma<T, true>(h[half], scaled[k], b + half * 512 + k * 128, true);
        }
        wgmma_end();
    }
    __device__ void add_weighted(int i, float (&y)[32]) {
        const uint32_t w = descriptor(shared.weights[i % 2]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int e = 0; e < 4; e++) y[k * 8 + e * 2] *= exp_s[k * 2 + e / 2].x, y[k * 8 + e * 2 + 1] *= exp_s[k * 2 + e / 2].y;
        }
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<T, false>(y, x[k], w + k * 2, true);
        wgmma_end();
    }
    // The empty assembly keeps the compiler from moving these loads and products after the next
    // wait, where they would delay the tensor cores.
    __device__ void take_rest(int i) {
#pragma unroll
        for (int k = 0; k < 8; k++) state_weight[k] = *reinterpret_cast<const float2*>(&shared.sums[i % 3].state_weight[k * 8 + pair]);
#pragma unroll
        for (int k = 0; k < 8; k++) asm volatile("" : "+f"(state_weight[k].x), "+f"(state_weight[k].y));
    }
    __device__ void take_x(int i) {
#pragma unroll
        for (int k = 0; k < 8; k++) exp_s[k] = *reinterpret_cast<const float2*>(&shared.sums[i % 3].exp_s[k * 8 + pair]);
#pragma unroll
        for (int k = 0; k < 4; k++) load_transposed(x[k], &shared.x[i % 3][swizzled(k * 16 + matrix / 2 * 8 + line, warp * 2 + matrix % 2)]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 factor = state_weight[k * 2 + e / 2], both = unpacked<T>(x[k][e]);
                scaled[k][e] = packed<T>(both.x * factor.x, both.y * factor.y);
                asm volatile("" : "+r"(scaled[k][e]));
            }
        }
    }
    __device__ void give_y(int i, const float (&y)[32]) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            store_transposed(&shared.x[i % 3][swizzled(k * 16 + matrix / 2 * 8 + line, warp * 2 + matrix % 2)], packed<T>(y[k * 8], y[k * 8 + 1]),
                             packed<T>(y[k * 8 + 2], y[k * 8 + 3]), packed<T>(y[k * 8 + 4], y[k * 8 + 5]), packed<T>(y[k * 8 + 6], y[k * 8 + 7]));
        }
    }
    // Processes chunk i. At the start, y holds H' C' of the chunk. At the end, `next` holds that of
    // chunk i + 1, whose operands are loaded. After the last chunk, these are undefined and unused.
    // No product is in flight between steps, because the compiler could not tell which registers it
    // writes.
    __device__ void step(int i, float (&y)[32], float (&next)[32]) {
        add_to_state(i);
        add_weighted(i, y);
        wgmma_await<1>();
#pragma unroll
        for (int half = 0; half < N / 64; half++) arrived(h[half]);
        leave(i + 1);
        if (i + 1 < chunks) await_barrier(&shared.full[(i + 1) % 3], (i + 1) / 3 % 2);
        read_state(i + 1, next);
        wgmma_await<1>();
        arrived(y);
        give_y(i, y);
        take_rest(i + 1);
        __syncthreads();
        take_x(i + 1);
        wgmma_await<0>();
        arrived(next);
    }
    __device__ void multiply_all() {
#pragma unroll
        for (int half = 0; half < N / 64; half++) {
#pragma unroll
            for (int e = 0; e < 32; e++) h[half][e] = *state_at(half, e);
        }
        __syncthreads();
        leave(0);
        float y[32], next[32];
        await_barrier(&shared.full[0], 0);
        __syncthreads();
        read_state(0, y);
        take_rest(0);
        take_x(0);
        wgmma_await<0>();
        arrived(y);
        for (int i = 0; i < chunks; i += 2) {
            step(i, y, next);
            if (i + 1 < chunks) step(i + 1, next, y);
        }
        if (extra) return;
#pragma unroll
        for (int half = 0; half < N / 64; half++) {
#pragma unroll
            for (int e = 0; e < 32; e++) *state_at(half, e) = h[half][e];
        }
    }

    __device__ void run() {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 3; i++) set_barrier(&shared.full[i], 1), set_barrier(&shared.free[i], SSD_CLUSTER);
            share_barriers();
        }
        sync_cluster();
        const int role = threadIdx.x / 128;
        if (role == 0) {
            take_registers<240>();
            multiply_all();
        } else {
            leave_registers<120>();
            if (role == 1) weigh_all();
            else if (warp == 2) copy_all_group_tiles();
            else if (warp == 3) sum_all_steps();
            else copy_inputs_and_outputs();
        }
        sync_cluster();  // No block may end while others copy to it or arrive at its barriers.
    }
};

// Grid (groups * (heads / groups / 2) * 2, batch), SSD_WGMMA_THREADS threads, SsdWgmmaShared<T,
// states> bytes of dynamic shared memory.
template <class T>
__device__ void ssd_wgmma(const Ssd& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char squares[];
    if (p.states == 64) SsdHead<T, 64>(p, *(SsdWgmmaShared<T, 64>*)squares).run();
    else SsdHead<T, 128>(p, *(SsdWgmmaShared<T, 128>*)squares).run();
#endif
}

}  // namespace hybrid

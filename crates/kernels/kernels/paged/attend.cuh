// Attention of a few queries of many sequences: flash decoding, which splits the entries into parts
// and merges the partial results.
//
// A warp multiplies tiles of 16 entries by 8 N columns with tensor cores: scores = K Q^T, then
// out^T += V^T P. Its tiles pass through a ring in shared memory, without a barrier between warps.
// Probabilities are split into a rounded number and the rest, so that outputs are as exact as with
// f32.
#pragma once
#include <dependent.cuh>
#include "args.cuh"
#include "mma.cuh"

constexpr int TILE = 16, STAGES = 3;
// Scores may exceed the base of their column's softmax by SLACK, so that outputs are rarely scaled.
constexpr float SLACK = 8.f;

// The sizes of a thread block's rings for heads of D channels.
template <int D>
struct Rings {
    // Warps of the thread block. Wide heads have fewer, so that the rings fit in 100 KB.
    static constexpr int WARPS = D > 128 ? 2 : 4, THREADS = 32 * WARPS;
    // 16-byte pieces of a row. Rows of whole groups of 8 pieces are swizzled, others padded.
    static constexpr int PIECES = D / 8, ROW = PIECES % 8 ? PIECES + 1 : PIECES;
    // Pieces of the keys of a tile. Its values follow.
    static constexpr int KEYS = TILE * ROW;
    static constexpr int BYTES = WARPS * STAGES * 2 * KEYS * 16;
};

// Returns the offset in bytes of a piece of a row. Eight rows of a matrix lie in different banks.
template <int D>
__device__ __forceinline__ int offset_of(int row, int piece) {
    return 16 * (row * Rings<D>::ROW + (Rings<D>::PIECES % 8 ? piece : piece ^ (row & 7)));
}

// Returns the address of a later piece of a row. `address` is that of piece 0 or 1, and `pieces`,
// the distance, is even.
template <int D>
__device__ __forceinline__ uint32_t later(uint32_t address, int pieces) {
    return Rings<D>::PIECES % 8 ? address + 16 * pieces : (address ^ (16 * (pieces & 6))) + 16 * (pieces & ~7);
}

// Returns two numbers in half precision, and subtracts them from the numbers.
template <class Pair>
__device__ __forceinline__ uint32_t take_rounded(float2& x) {
    Pair rounded;
    narrow(rounded, x);
    const float2 wide = widen(rounded);
    x.x -= wide.x, x.y -= wide.y;
    return *reinterpret_cast<uint32_t*>(&rounded);
}

__device__ __forceinline__ void store(void* p, long long i, int kind, float x) {
    if (kind == 2) static_cast<float*>(p)[i] = x;
    else if (kind == 1) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(x);
    else static_cast<__half*>(p)[i] = __float2half(x);
}

// Returns the row of q, out and lse for a column.
__device__ __forceinline__ long long row_of(const AttendArgs& a, const AttendWork& work, int column) {
    return (long long)(work.first_token + column % work.queries) * a.heads + work.kv_head * a.heads_per_kv + column / work.queries;
}

// Stores a column's channel and, with channel 0, its log-sum-exp. `sum` is that of 2^(score - top).
__device__ __forceinline__ void finish(const AttendArgs& a, const AttendWork& work, int column, int channel, float value, float top, float sum) {
    const long long row = row_of(a, work, column);
    store(a.out, row * a.head_dim + channel, a.out_kind, sum > 0.f ? value / sum : 0.f);
    if (channel == 0 && a.lse) a.lse[row] = sum > 0.f ? (top + log2f(sum)) / LOG2E : -INFINITY;
}

// Stores a thread's scores of a tile: those of tokens g and g + 8 for columns 2 t and 2 t + 1.
template <int N>
__device__ __forceinline__ void store_scores(const AttendArgs& a, const AttendWork& work, const float (&scores)[N][4], int first, int columns) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int token = first + lane / 4 + j / 2 * 8, column = work.first_column + 8 * n + lane % 4 * 2 + j % 2;
            if (token < work.to && column < columns) a.scores[row_of(a, work, column) * a.scores_row + token] = scores[n][j];
        }
}

// Merges the partial results of a kv head and a block of columns. A warp merges a column, 32 parts
// at a time: a lane reads the weight of one part, and four channels of each part. BATCH parts are
// read at once, the first of them before their weights are known.
template <int D, int N>
__device__ __forceinline__ void merge(const AttendArgs& a, const AttendWork& work, int columns) {
    constexpr int BATCH = 16, PIECES = D / 4, EACH = (PIECES + 31) / 32;
    static_assert(D % 4 == 0, "a lane reads four channels");
    const int lane = threadIdx.x % 32;
    for (int c = threadIdx.x / 32; c < 8 * N && work.first_column + c < columns; c += Rings<D>::WARPS) {
        const long long first = (long long)work.first_part * (8 * N) + c;
        const float4* from = reinterpret_cast<const float4*>(a.part_out + first * D);
        // Parts beyond the last repeat it, and lanes beyond the last channels repeat them.
        auto read = [&](float4 (&x)[EACH][BATCH], int start) {
#pragma unroll
            for (int s = 0; s < BATCH; s++)
#pragma unroll
                for (int e = 0; e < EACH; e++) x[e][s] = __ldcg(from + (long long)min(start + s, work.parts - 1) * (8 * N) * PIECES + min(32 * e + lane, PIECES - 1));
        };
        float top = -INFINITY, sum = 0.f;
        float4 value[EACH] = {}, x[EACH][BATCH];
        for (int start = 0; start < work.parts; start += 32) {
            read(x, start);
            const bool mine = start + lane < work.parts;
            const long long at = first + (long long)(start + lane) * (8 * N);
            const float base = mine ? __ldcg(a.part_max + at) : -INFINITY, own = mine ? __ldcg(a.part_sum + at) : 0.f;
            float highest = fmaxf(top, base);
#pragma unroll
            for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
            if (highest == -INFINITY) continue;
            const float weight = power_of_two(base - highest), factor = power_of_two(top - highest);
            top = highest, sum = fmaf(sum, factor, own * weight);
#pragma unroll
            for (int e = 0; e < EACH; e++) value[e].x *= factor, value[e].y *= factor, value[e].z *= factor, value[e].w *= factor;
#pragma unroll
            for (int half = 0; half < 32; half += BATCH) {
                if (start + half >= work.parts) break;
                if (half) read(x, start + half);
#pragma unroll
                for (int s = 0; s < BATCH; s++) {
                    const float by = __shfl_sync(~0u, weight, half + s);
#pragma unroll
                    for (int e = 0; e < EACH; e++) {
                        float4& y = value[e];
                        const float4 z = x[e][s];
                        y.x = fmaf(z.x, by, y.x), y.y = fmaf(z.y, by, y.y), y.z = fmaf(z.z, by, y.z), y.w = fmaf(z.w, by, y.w);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            if (32 * e + lane >= PIECES) continue;
            const float of[4] = {value[e].x, value[e].y, value[e].z, value[e].w};
#pragma unroll
            for (int j = 0; j < 4; j++) finish(a, work, work.first_column + c, 4 * (32 * e + lane) + j, of[j], top, sum);
        }
    }
}

// Grid: one thread block for each item of `work`.
template <class Pair, int D, int N>
__device__ __forceinline__ void attend(const AttendArgs& a) {
    start_next_kernel();
    if (!a.early) wait_for_previous_kernel();
    constexpr int WARPS = Rings<D>::WARPS, PIECES = Rings<D>::PIECES, KEYS = Rings<D>::KEYS, STEPS = D / 16, COPIES = TILE * PIECES / 32, STAGE = 32 * KEYS;
    static_assert(TILE * PIECES % 32 == 0 && D % 16 == 0, "a lane copies whole pieces");
    extern __shared__ __align__(128) uint4 rings[];  // `later` changes bits of addresses.
    __shared__ float maxima[WARPS][8 * N], sums[WARPS][8 * N];
    __shared__ bool last;
    const AttendWork work = a.work[blockIdx.x];
    if (work.queries == 0) {
        wait_for_previous_kernel();
        return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int columns = a.heads_per_kv * work.queries;

    // The entries that columns 2 t and 2 t + 1 of each group see. All columns see those from
    // `all_from` to `all_to`.
    int seen_from[N][2], seen_to[N][2];
    float base[N][2], sum[N][2], acc[N][STEPS][4] = {};
    const int first_to = a.causal ? work.len - work.queries + 1 : work.len;
    const int all_to = min(first_to, work.to), all_from = a.causal && a.window ? work.len - a.window : 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int query = min(work.first_column + 8 * n + 2 * t + c, columns - 1) % work.queries;
            const int to = a.causal ? first_to + query : work.len;
            seen_to[n][c] = min(to, work.to), seen_from[n][c] = a.causal && a.window ? to - a.window : 0;
            base[n][c] = -INFINITY, sum[n][c] = 0.f;
        }

    // Copies of tiles. The entries of a tile are contiguous, except those of a list.
    const uint64_t* table = a.tables[work.table];
    const int count = (work.to - work.from + WARPS * TILE - 1 - warp * TILE) / (WARPS * TILE);
    const uint32_t ring = shared_address(rings) + warp * STAGES * STAGE;
    uint32_t to[COPIES];
#pragma unroll
    for (int c = 0; c < COPIES; c++) to[c] = ring + offset_of<D>((32 * c + lane) / PIECES, (32 * c + lane) % PIECES);
    auto first_of = [&](int i) { return work.from + (i * WARPS + warp) * TILE; };
    // Returns the address of the first key of a tile or, of a list, of the key of row lane % TILE.
    // Rows past a list's end repeat its last entry.
    auto key_of = [&](int i) -> const char* {
        if (i >= count) return nullptr;
        const int entry = work.entries ? work.entries[min(first_of(i) + lane % TILE, work.to - 1)] : first_of(i);
        return reinterpret_cast<const char*>(table[entry / PAGE]) + entry % PAGE * (2 * D);
    };
    auto fetch = [&](int i, int stage, const char* key) {
        if (i < count) {
            if (work.entries) {
#pragma unroll
                for (int c = 0; c < COPIES; c++) {
                    const int row = (32 * c + lane) / PIECES, piece = (32 * c + lane) % PIECES;
                    const char* from = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(key), row)) + 16 * piece;
                    copy_async(to[c] + stage * STAGE, from), copy_async(to[c] + stage * STAGE + 16 * KEYS, from + PAGE * D * 2);
                }
            } else {
                const char* from = key + 16 * lane;
#pragma unroll
                for (int c = 0; c < COPIES; c++)
                    copy_async(to[c] + stage * STAGE, from + 512 * c), copy_async(to[c] + stage * STAGE + 16 * KEYS, from + 512 * c + PAGE * D * 2);
            }
        }
        commit_copies();
    };
    // The launch before, an append, writes the last entries and the addresses of their blocks. Lists
    // may contain these entries.
    const bool old = !work.entries && first_of(STAGES - 1) + TILE <= work.len - work.queries;
    if (!old) wait_for_previous_kernel();
    const char* key = key_of(0);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(i, i, key), key = key_of(i + 1);
    wait_for_previous_kernel();

    // Column g of each group of 8: the second operand of the scores.
    uint32_t q[N][STEPS][2];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int column = min(work.first_column + 8 * n + g, columns - 1);  // Columns beyond the last repeat it.
        const uint32_t* row = static_cast<const uint32_t*>(a.q) + row_of(a, work, column) * (D / 2);
#pragma unroll
        for (int s = 0; s < STEPS; s++) q[n][s][0] = row[8 * s + t], q[n][s][1] = row[8 * s + t + 4];
    }

    // The addresses of a lane's rows of the first operands.
    const uint32_t key_row = ring + offset_of<D>(lane % 16, lane / 16);
    const uint32_t value_row = ring + 16 * KEYS + offset_of<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const float scale = a.soft_cap > 0.f ? a.scale / a.soft_cap : a.scale * LOG2E;
    for (int i = 0, stage = 0; i < count; i++) {
        fetch(i + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1, key);
        key = key_of(i + STAGES);
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        const int first = first_of(i);
        if (first + TILE > work.to && !work.entries) {
            // Entries after the last one are undefined, and 0 * NaN is NaN.
            for (int j = lane; j < KEYS; j += 32)
                if (first + j / Rings<D>::ROW >= work.to) rings[(warp * STAGES + stage) * 2 * KEYS + KEYS + j] = make_uint4(0, 0, 0, 0);
            __syncwarp();
        }
        float scores[N][4] = {}, odd[N][4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint32_t k[4];
            load_matrices(k, later<D>(key_row + stage * STAGE, 2 * s));
#pragma unroll
            for (int n = 0; n < N; n++) multiply(s % 2 ? odd[n] : scores[n], k, q[n][s][0], q[n][s][1], Pair());
        }
        // A thread has the scores of tokens g and g + 8 for columns 2 t and 2 t + 1.
        const bool edge = first < all_from || first + TILE > all_to;
        bool higher = false;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float& x = scores[n][j];
                x = (x + odd[n][j]) * scale;
                if (a.soft_cap > 0.f) x = a.soft_cap * LOG2E * tanhf(x);
                const int token = first + g + j / 2 * 8;
                if (edge && (token < seen_from[n][j % 2] || token >= seen_to[n][j % 2])) x = -INFINITY;
                higher |= x > base[n][j % 2] + SLACK;
            }
        if (a.scores) store_scores<N>(a, work, scores, first, columns);
        if (__any_sync(~0u, higher))
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float top = fmaxf(base[n][c], fmaxf(scores[n][c], scores[n][2 + c]));
#pragma unroll
                    for (int j = 4; j < 32; j *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, j));
                    const float factor = top == -INFINITY ? 1.f : power_of_two(base[n][c] - top);
                    base[n][c] = top, sum[n][c] *= factor;
#pragma unroll
                    for (int s = 0; s < STEPS; s++) acc[n][s][c] *= factor, acc[n][s][2 + c] *= factor;
                }
        uint32_t p[N][2], rest[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
            // Before its first visible entry a column has no base, and all its scores are -inf.
            const float from[2] = {base[n][0] == -INFINITY ? 0.f : base[n][0], base[n][1] == -INFINITY ? 0.f : base[n][1]};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 x = make_float2(power_of_two(scores[n][2 * half] - from[0]), power_of_two(scores[n][2 * half + 1] - from[1]));
                sum[n][0] += x.x, sum[n][1] += x.y;
                p[n][half] = transposed(take_rounded<Pair>(x));
                rest[n][half] = transposed(take_rounded<Pair>(x));
            }
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint32_t v[4];
            load_transposed(v, later<D>(value_row + stage * STAGE, 2 * s));
#pragma unroll
            for (int n = 0; n < N; n++) multiply(acc[n][s], v, p[n][0], p[n][1], Pair()), multiply(acc[n][s], v, rest[n][0], rest[n][1], Pair());
        }
        __syncwarp();  // The next copies overwrite this tile's place.
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // Join the warps of the thread block. All copies have arrived, so the rings can be reused.
    wait_for_copies<0>();
    __syncthreads();
    float* outs = reinterpret_cast<float*>(rings);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int column = 8 * n + 2 * t + c;
#pragma unroll
            for (int j = 4; j < 32; j *= 2) sum[n][c] += __shfl_xor_sync(~0u, sum[n][c], j);
            if (g == 0) maxima[warp][column] = base[n][c], sums[warp][column] = sum[n][c];
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int half = 0; half < 2; half++) outs[(warp * 8 * N + column) * D + 16 * s + 8 * half + g] = acc[n][s][2 * half + c];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * N * D; i += Rings<D>::THREADS) {
        const int c = i / D, channel = i % D;
        if (work.first_column + c >= columns) break;
        float highest = -INFINITY, whole = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w][c]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = highest == -INFINITY ? 0.f : power_of_two(maxima[w][c] - highest);
            whole = fmaf(sums[w][c], factor, whole), value = fmaf(outs[(w * 8 * N + c) * D + channel], factor, value);
        }
        if (work.parts == 1) {
            finish(a, work, work.first_column + c, channel, value, highest, whole);
            continue;
        }
        const long long at = (long long)(work.first_part + work.part) * (8 * N) + c;
        a.part_out[at * D + channel] = value;
        if (channel == 0) a.part_max[at] = highest, a.part_sum[at] = whole;
    }
    if (work.parts == 1) return;
    // The thread block that arrives last merges the parts.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + work.merge, 1u) == unsigned(work.parts - 1);
        if (last) a.arrived[work.merge] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    merge<D, N>(a, work, columns);
}

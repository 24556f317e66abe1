// Prefill attention for compute capability 9.0a, warp-specialised as in FlashAttention-3 (arXiv
// 2407.08608). One thread copies queries, keys and values to shared memory with tensor maps. Warp
// groups of 64 rows each multiply. A warp group computes the scores of a key block while it
// multiplies the values of the previous block. The warp groups take turns, so that the softmax of
// one overlaps the products of the others.
#pragma once
#include "softmax.cuh"
#include "wgmma.cuh"

template <int D>
struct WgmmaShape {
    static constexpr int WARP_GROUPS = D == 64 ? 3 : 2;  // Warp groups that multiply
    static constexpr int ROWS = WARP_GROUPS * 64, THREADS = ROWS * 2 + 128;
    static constexpr int N = D <= 128 ? 128 : 64;        // Keys per block
    static constexpr int STAGES = 2;
    static constexpr int COLUMNS = (D + 63) / 64;        // Columns of 64 elements; copies pad them with zeros
    static constexpr int REGISTERS = WARP_GROUPS == 2 ? 240 : 160, COPY_REGISTERS = WARP_GROUPS == 2 ? 24 : 32;
    static constexpr bool TAKE_TURNS = D <= 128;
    static constexpr int SHARED_BYTES = COLUMNS * 128 * (ROWS + 2 * STAGES * N) + 1024;  // As in src/prefill.rs
};

template <class T, int D>
struct WgmmaShared {
    using Shape = WgmmaShape<D>;
    using Matrix = T[Shape::COLUMNS][Shape::N][64];
    alignas(1024) T q[Shape::COLUMNS][Shape::ROWS][64];
    alignas(1024) Matrix k[Shape::STAGES];
    alignas(1024) Matrix v[Shape::STAGES];
    uint64_t q_full, k_full[Shape::STAGES], v_full[Shape::STAGES], k_empty[Shape::STAGES], v_empty[Shape::STAGES];
    Tile tile;
    int found;
};

static_assert(sizeof(WgmmaShared<__half, 64>) == WgmmaShape<64>::SHARED_BYTES, "tiles and 1,024 bytes for the rest");
static_assert(sizeof(WgmmaShared<__half, 128>) == WgmmaShape<128>::SHARED_BYTES, "tiles and 1,024 bytes for the rest");
static_assert(sizeof(WgmmaShared<__half, 256>) == WgmmaShape<256>::SHARED_BYTES, "tiles and 1,024 bytes for the rest");

// A slot of a ring in shared memory, and the parity of its barriers.
template <int STAGES>
struct Stage {
    int index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }
};

// ---- The thread that copies ----

template <class T, int D>
struct Copier {
    using Shape = WgmmaShape<D>;
    WgmmaShared<T, D>& shared;
    const PrefillArgs& a;
    const uint32_t* table;  // Null if keys are contiguous

    __device__ __forceinline__ Copier(const PrefillArgs& a, WgmmaShared<T, D>& shared) : shared(shared), a(a), table(nullptr) {
        if (a.block_table)
            table = reinterpret_cast<const uint32_t*>(a.block_table) + shared.tile.seq * a.table_seq + shared.tile.kv_head * a.table_head;
    }

    __device__ __forceinline__ void copy_q(const CUtensorMap* map) {
        const int tokens = Shape::ROWS / a.pack;
        mbarrier_expect(&shared.q_full, Shape::COLUMNS * tokens * a.pack * 128);
        for (int c = 0; c < Shape::COLUMNS; c++)
            copy_box(shared.q[c], map, c * 64, shared.tile.first_head, shared.tile.first_token, &shared.q_full);
    }

    __device__ __forceinline__ void copy_block(T (*to)[Shape::N][64], const CUtensorMap* map, int block, uint64_t* full) {
        const Tile& tile = shared.tile;
        mbarrier_expect(full, sizeof(typename WgmmaShared<T, D>::Matrix));
#pragma unroll
        for (int part = 0; part < Shape::N / PAGE; part++) {
            const int key = block * Shape::N + part * PAGE;
            // Keys of pages after the last one are masked, so any page may be copied.
            const int y = table ? 0 : tile.first_key + key, z = table ? table[min(key, tile.keys - 1) / PAGE] : tile.kv_head;
#pragma unroll
            for (int c = 0; c < Shape::COLUMNS; c++) copy_box(to[c][part * PAGE], map, c * 64, y, z, full);
        }
    }

    // Copies in the order in which the warp groups read.
    __device__ __forceinline__ void run(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v) {
        const KeyBlocks blocks = key_blocks<Shape::N>(shared.tile);
        Stage<Shape::STAGES> k, v;
        auto copy_k = [&](int block) {
            mbarrier_wait(&shared.k_empty[k.index], k.parity ^ 1);
            copy_block(shared.k[k.index], map_k, block, &shared.k_full[k.index]);
            k.advance();
        };
        auto copy_v = [&](int block) {
            mbarrier_wait(&shared.v_empty[v.index], v.parity ^ 1);
            copy_block(shared.v[v.index], map_v, block, &shared.v_full[v.index]);
            v.advance();
        };
        if (blocks.begin >= blocks.end) return;
        copy_q(map_q);
        copy_k(blocks.end - 1);
        for (int block = blocks.end - 2; block >= blocks.begin; block--) copy_k(block), copy_v(block + 1);
        copy_v(blocks.begin);
    }
};

// ---- A warp group that multiplies ----

template <class T, int D>
struct Multiplier {
    using Shape = WgmmaShape<D>;
    static constexpr int N = Shape::N;
    WgmmaShared<T, D>& shared;
    const PrefillArgs& a;
    const int group;
    Softmax softmax;
    Stage<Shape::STAGES> k, v;
    float o[D / 2];
    uint32_t p[N / 16][4];

    __device__ __forceinline__ Multiplier(const PrefillArgs& a, WgmmaShared<T, D>& shared)
        : shared(shared), a(a), group(threadIdx.x / 128 - 1), softmax(a) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    }

    // Recomputed at each use: most blocks need no mask, and registers are scarce.
    __device__ __forceinline__ Rows rows() const {
        return Rows(shared.tile, a.pack, threadIdx.x / 32 * 16 - 64, Shape::ROWS / a.pack * a.pack);
    }

    __device__ __forceinline__ void start_scores(float (&s)[N / 2]) {
        const uint64_t q = swizzled_descriptor(shared.q[0][group * 64], 16);
        const uint64_t b = swizzled_descriptor(shared.k[k.index], 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const int column = i / 4, step = i % 4 * 2;  // In units of 16 bytes
            wgmma_ss<T, N>(s, q + column * Shape::ROWS * 8 + step, b + column * N * 8 + step, i > 0);
        }
        wgmma_commit();
    }
    __device__ __forceinline__ void start_values() {
        const uint64_t b = swizzled_descriptor(shared.v[v.index], N * 128);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 16; i++) wgmma_rs<T, D>(o, p[i], b + i * 128, true);
        wgmma_commit();
    }
    __device__ __forceinline__ void release(uint64_t* empty) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    }

    // Zeroes the values after the last key: they are undefined, and 0 * NaN is NaN. Each warp group
    // does it for itself.
    __device__ __forceinline__ void clear_values(int first_key) {
        const int from = max(shared.tile.keys - first_key, 0);
        if (from >= N) return;
        mbarrier_wait(&shared.v_full[v.index], v.parity);
        for (int i = threadIdx.x % 128; i < (N - from) * Shape::COLUMNS * 8; i += 128) {
            const int row = from + i / 8 / Shape::COLUMNS, column = i / 8 % Shape::COLUMNS;
            reinterpret_cast<uint4*>(shared.v[v.index][column][row])[i % 8] = make_uint4(0, 0, 0, 0);
        }
        fence_async_proxy();
        named_sync(1 + Shape::WARP_GROUPS + group, 128);
    }

    __device__ __forceinline__ void await_turn() {
        if (Shape::TAKE_TURNS) named_sync(1 + group, 256);
    }
    __device__ __forceinline__ void pass_turn() {
        if (Shape::TAKE_TURNS) named_arrive(1 + (group + 1) % Shape::WARP_GROUPS, 256);
    }

    __device__ __forceinline__ void first_block(int block) {
        float s[N / 2], factor[2];
        mbarrier_wait(&shared.q_full, 0);
        mbarrier_wait(&shared.k_full[k.index], k.parity);
        start_scores(s);
        clear_values(block * N);
        wgmma_wait<0>();
        pin(s);
        release(&shared.k_empty[k.index]);
        k.advance();
        softmax.cap(s);
        softmax.mask(s, rows(), block * N);
        softmax.update(s, factor);
        to_operand<T>(s, p);
    }

    // Computes the scores of a block, and multiplies the values of the previous one.
    template <bool MASKED>
    __device__ __forceinline__ void step(int block) {
        float s[N / 2], factor[2];
        mbarrier_wait(&shared.k_full[k.index], k.parity);
        await_turn();
        start_scores(s);
        mbarrier_wait(&shared.v_full[v.index], v.parity);
        start_values();
        pass_turn();
        wgmma_wait<1>();
        pin(s);
        release(&shared.k_empty[k.index]);
        k.advance();
        softmax.cap(s);
        if constexpr (MASKED) softmax.mask(s, rows(), block * N);
        softmax.update(s, factor);
        wgmma_wait<0>();
        pin(o);
        release(&shared.v_empty[v.index]);
        v.advance();
        to_operand<T>(s, p);
        rescale(o, factor);
    }

    __device__ __forceinline__ void last_values() {
        mbarrier_wait(&shared.v_full[v.index], v.parity);
        start_values();
        wgmma_wait<0>();
        pin(o);
    }

    __device__ __forceinline__ void run() {
        const KeyBlocks blocks = key_blocks<N>(shared.tile);
        if (blocks.begin < blocks.end) {
            if (Shape::TAKE_TURNS && group == 0) named_arrive(1, 256);  // Group 0 has the first turn.
            int block = blocks.end - 1;
            first_block(block--);
#pragma unroll 1
            for (; block >= max(blocks.begin, blocks.clear_end); block--) step<true>(block);
#pragma unroll 1
            for (; block >= max(blocks.begin, blocks.clear_begin); block--) step<false>(block);
#pragma unroll 1
            for (; block >= blocks.begin; block--) step<true>(block);
            last_values();
        }
        store_rows<T, D>(a, shared.tile, rows(), o, softmax);
        if (blocks.begin < blocks.end && group == 0) await_turn();  // Consumes the last arrival.
    }
};

// Grid: at least the number of tiles of the call, (tokens / (ROWS / pack) + seqs) * heads / pack.
// THREADS threads, SHARED_BYTES of dynamic shared memory.
template <class T, int D>
__device__ __forceinline__ void prefill_wgmma(const PrefillArgs& a, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v) {
    using Shape = WgmmaShape<D>;
    extern __shared__ __align__(1024) unsigned char memory[];
    WgmmaShared<T, D>& shared = *reinterpret_cast<WgmmaShared<T, D>*>(memory);
    if (threadIdx.x < 32) {
        const bool found = find_tile<Shape::ROWS, D>(a, blockIdx.x, shared.tile);
        if (threadIdx.x == 0) {
            shared.found = found;
            prefetch_map(q), prefetch_map(k), prefetch_map(v);
            mbarrier_init(&shared.q_full, 1);
            for (int i = 0; i < Shape::STAGES; i++) {
                mbarrier_init(&shared.k_full[i], 1), mbarrier_init(&shared.v_full[i], 1);
                mbarrier_init(&shared.k_empty[i], Shape::WARP_GROUPS * 4), mbarrier_init(&shared.v_empty[i], Shape::WARP_GROUPS * 4);
            }
            mbarrier_init_fence();
        }
    }
    __syncthreads();
    if (!shared.found) return;
    if (threadIdx.x < 128) {
        decrease_registers<Shape::COPY_REGISTERS>();
        if (threadIdx.x == 0) Copier<T, D>(a, shared).run(q, k, v);
    } else {
        increase_registers<Shape::REGISTERS>();
        Multiplier<T, D>(a, shared).run();
    }
}

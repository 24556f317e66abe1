// Prefill attention for compute capabilities without wgmma, as in FlashAttention-2 (arXiv
// 2307.08691): four warps of 16 or 32 rows with mma.m16n8k16. Copies are asynchronous: a block's
// values arrive while its scores are computed, and the next keys while its values are multiplied.
#pragma once
#include "softmax.cuh"

constexpr int MMA_THREADS = 128;
template <int D>
struct MmaShape {
    static constexpr int ROW_TILES = D <= 128 ? 2 : 1;  // Tiles of 16 rows per warp; they share its reads of keys and values
    static constexpr int ROWS = 64 * ROW_TILES;
    static constexpr int N = D <= 96 ? 64 : 32;         // Keys per block
    static constexpr int COLUMNS = (D + 63) / 64;       // Columns of 64 elements
    static constexpr int SHARED_BYTES = COLUMNS * 128 * (ROWS + 2 * N);  // As in src/prefill.rs
};

// Columns of 64 elements; a row of a column has 128 bytes. Piece i (16 bytes) of row r is stored at
// piece i xor r % 8.
template <class T, int D>
struct MmaShared {
    using Shape = MmaShape<D>;
    using Keys = T[Shape::COLUMNS][Shape::N][64];
    alignas(128) T q[Shape::COLUMNS][Shape::ROWS][64];
    alignas(128) Keys k;
    alignas(128) Keys v;
};

static_assert(sizeof(MmaShared<__half, 80>) == MmaShape<80>::SHARED_BYTES, "tiles alone");

__device__ __forceinline__ void copy_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
    const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
}
template <class T>
__device__ __forceinline__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MMA(TYPE)                                                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same<T, __half>::value) MMA("f16");
    else MMA("bf16");
#undef MMA
}

template <class T, int D>
struct MmaTile {
    using Shape = MmaShape<D>;
    using Keys = typename MmaShared<T, D>::Keys;
    static constexpr int N = Shape::N, ROW_TILES = Shape::ROW_TILES;
    MmaShared<T, D>& shared;
    const PrefillArgs& a;
    const Tile tile;
    Softmax softmax[ROW_TILES];
    float o[ROW_TILES][D / 2];

    __device__ __forceinline__ MmaTile(const PrefillArgs& a, MmaShared<T, D>& shared, const Tile& tile) : shared(shared), a(a), tile(tile) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            softmax[m] = Softmax(a);
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[m][i] = 0.f;
        }
    }

    __device__ __forceinline__ int first_row(int m) const { return (threadIdx.x / 32 * ROW_TILES + m) * 16; }
    // Recomputed at each use: most blocks need no mask, and registers are scarce.
    __device__ __forceinline__ Rows rows(int m) const { return Rows(tile, a.pack, first_row(m), Shape::ROWS / a.pack * a.pack); }

    template <int ROWS>
    __device__ static __forceinline__ T* piece_at(T (&x)[Shape::COLUMNS][ROWS][64], int row, int piece) {
        return &x[piece / 8][row][(piece % 8 ^ row % 8) * 8];
    }

    // `row_at` returns the address of a row, or null for a row of zeros.
    template <int ROWS, class RowAt>
    __device__ __forceinline__ void copy_rows(T (&to)[Shape::COLUMNS][ROWS][64], RowAt row_at) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * (D / 8); i += MMA_THREADS) {
            const int row = i / (D / 8), piece = i % (D / 8);
            const T* from = row_at(row);
            copy_16(piece_at(to, row, piece), from ? from + piece * 8 : reinterpret_cast<const T*>(a.q), from != nullptr);
        }
    }
    __device__ __forceinline__ void copy_q() {
        copy_rows(shared.q, [&](int row) -> const T* {
            const int token = row / a.pack;
            if (token >= tile.tokens) return nullptr;
            return reinterpret_cast<const T*>(a.q) + (tile.first_token + token) * a.q_token + (tile.first_head + row % a.pack) * a.q_head;
        });
    }
    __device__ __forceinline__ void copy_block(Keys& to, uint64_t from, int64_t token_stride, int64_t head_stride, int block) {
        const T* first = reinterpret_cast<const T*>(from);
        const int key = block * N;
        if (a.block_table) {
            const uint32_t* table = reinterpret_cast<const uint32_t*>(a.block_table) + tile.seq * a.table_seq + tile.kv_head * a.table_head;
            first += table[key / PAGE] * head_stride + key % PAGE * token_stride;
        } else {
            first += (int64_t(tile.first_key) + key) * token_stride + tile.kv_head * head_stride;
        }
        const int keys = tile.keys - key;
        copy_rows(to, [&](int row) { return row < keys ? first + row * token_stride : nullptr; });
        commit_copies();
    }
    __device__ __forceinline__ void copy_k(int block) { copy_block(shared.k, a.k, a.k_token, a.k_head, block); }
    __device__ __forceinline__ void copy_v(int block) { copy_block(shared.v, a.v, a.v_token, a.v_head, block); }

    __device__ __forceinline__ void add_scores(float (&s)[ROW_TILES][N / 2]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t q[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) load_matrices<false>(q[m], piece_at(shared.q, first_row(m) + lane % 16, 2 * i + lane / 16));
#pragma unroll
            for (int j = 0; j < N / 16; j++) {
                uint32_t k[4];
                load_matrices<false>(k, piece_at(shared.k, 16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) mma<T>(s[m] + 8 * j, q[m], k[0], k[1]), mma<T>(s[m] + 8 * j + 4, q[m], k[2], k[3]);
            }
        }
    }
    __device__ __forceinline__ void add_values(const uint32_t (&p)[ROW_TILES][N / 16][4]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t v[4];
                load_matrices<true>(v, piece_at(shared.v, 16 * i + lane % 16, 2 * j + lane / 16));
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) mma<T>(o[m] + 8 * j, p[m][i], v[0], v[1]), mma<T>(o[m] + 8 * j + 4, p[m][i], v[2], v[3]);
            }
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ void step(int block, int first_block) {
        float s[ROW_TILES][N / 2] = {};
        uint32_t p[ROW_TILES][N / 16][4];
        await_copies<0>();
        __syncthreads();  // k has arrived; v is no longer read.
        copy_v(block);
        add_scores(s);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            float factor[2];
            softmax[m].cap(s[m]);
            if constexpr (MASKED) softmax[m].mask(s[m], rows(m), block * N);
            softmax[m].update(s[m], factor);
            rescale(o[m], factor);
            to_operand<T>(s[m], p[m]);
        }
        await_copies<0>();
        __syncthreads();  // v has arrived; k is no longer read.
        if (block > first_block) copy_k(block - 1);
        add_values(p);
    }

    __device__ __forceinline__ void run() {
        const KeyBlocks blocks = key_blocks<N>(tile);
        if (blocks.begin < blocks.end) {
            copy_q();
            copy_k(blocks.end - 1);
            int block = blocks.end - 1;
#pragma unroll 1
            for (; block >= max(blocks.begin, blocks.clear_end); block--) step<true>(block, blocks.begin);
#pragma unroll 1
            for (; block >= max(blocks.begin, blocks.clear_begin); block--) step<false>(block, blocks.begin);
#pragma unroll 1
            for (; block >= blocks.begin; block--) step<true>(block, blocks.begin);
        }
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) store_rows<T, D>(a, tile, rows(m), o[m], softmax[m]);
    }
};

// Grid: at least the number of tiles of the call, (tokens / (ROWS / pack) + seqs) * heads / pack.
// MMA_THREADS threads, SHARED_BYTES of dynamic shared memory.
template <class T, int D>
__device__ __forceinline__ void prefill_mma(const PrefillArgs& a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Tile tile;
    if (find_tile<MmaShape<D>::ROWS, D>(a, blockIdx.x, tile)) MmaTile<T, D>(a, *reinterpret_cast<MmaShared<T, D>*>(memory), tile).run();
}

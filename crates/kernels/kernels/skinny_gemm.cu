// y = x wT for the few tokens of a decode step, limited by the bandwidth of reading w. Compute
// capability 9.0.
//
// A cluster of thread blocks computes two boxes of outputs at a time, for all tokens. Each of its
// thread blocks has a part of the summed dimension. One thread copies boxes of w and x to a ring in
// shared memory (tensor maps), and a warp group multiplies them (wgmma, w as the large operand). The
// cluster adds its partial sums in distributed shared memory.
//
// A launch may start before the kernels before it have ended (programmatic dependent launch). It can
// fill its ring with w, which does not depend on them, before it waits for them.
#include <cstddef>
#include <cstdint>
#include <dependent.cuh>
#include "half.cuh"
#include "prefill/wgmma.cuh"

// Arrays are contiguous, in f16 or bf16. Tensor maps give w and x: boxes of COLUMNS columns, and of
// BOX rows of w or TOKENS rows of x.
struct SkinnyGemmArgs {
    uint64_t y;       // Output, [tokens, outputs]: the product, or silu(gate) * up if gated
    int32_t tokens;   // At most the kernel's TOKENS
    int32_t outputs;  // Rows of w; gated: half of them, the gate projection before the up projection
    int32_t inner;    // Columns of w and x
    int32_t stages;   // Chunks in the ring
    int32_t ahead;    // Chunks of w to read before the kernels before have ended, at most `stages`
    int32_t unused;
};
static_assert(sizeof(SkinnyGemmArgs) == 32 && offsetof(SkinnyGemmArgs, tokens) == 8, "as in src/skinny_gemm.rs");

constexpr int BOX = 64, COLUMNS = 64, CONSUMERS = 128, THREADS = CONSUMERS + 32;
constexpr int WARPS = CONSUMERS / 32;

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of an object of this thread block in another one of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* p, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
    return address;
}

// Stores four numbers in another thread block, whose barrier counts their bytes.
__device__ __forceinline__ void store_remote(uint32_t to, const float (&x)[4], uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_weights(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(smem_address(barrier)), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void copy_tokens(void* to, const CUtensorMap* map, int x, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(smem_address(to)),
        "l"(map), "r"(x), "r"(0), "r"(smem_address(barrier))
        : "memory");
}

// A chunk of the ring: COLUMNS columns of two boxes of w and of x.
template <class T, int TOKENS>
struct Stage {
    T w[2][BOX][COLUMNS];
    T x[TOKENS][COLUMNS];
};

// The partial sums that a warp gets from the other thread blocks of the cluster for a tile.
template <int TOKENS, int CLUSTER>
struct Partial {
    float4 of_rank[CLUSTER - 1][TOKENS / 4][32];
};

// The chunks of a thread block: those of its columns, for each tile of its cluster.
struct Part {
    int tile, tiles, tile_step;
    int first, chunks;
    __device__ __forceinline__ Part(const SkinnyGemmArgs& a, int cluster, bool gated) {
        const int rank = cluster_rank(), rows = gated ? BOX : 2 * BOX, all = (a.inner + COLUMNS - 1) / COLUMNS;
        tile = blockIdx.x / cluster, tile_step = gridDim.x / cluster, tiles = (a.outputs + rows - 1) / rows;
        first = all * rank / cluster, chunks = all * (rank + 1) / cluster - first;
    }
};

// Copies the chunks, in one thread.
template <class T, int TOKENS, bool GATED>
struct Producer {
    const SkinnyGemmArgs& a;
    const CUtensorMap *w, *x;
    Stage<T, TOKENS>* ring;
    uint64_t *full, *empty;

    __device__ __forceinline__ void fetch_weights(const Part& part, int tile, int chunk, int slot, uint64_t policy) const {
        const int row = tile * (GATED ? BOX : 2 * BOX), column = (part.first + chunk) * COLUMNS;
        mbarrier_expect(&full[slot], int(sizeof(Stage<T, TOKENS>)));
        copy_weights(ring[slot].w[0], w, column, row, &full[slot], policy);
        copy_weights(ring[slot].w[1], w, column, row + (GATED ? a.outputs : BOX), &full[slot], policy);
    }
    __device__ __forceinline__ void fetch_tokens(const Part& part, int chunk, int slot) const {
        copy_tokens(ring[slot].x, x, (part.first + chunk) * COLUMNS, &full[slot]);
    }

    __device__ __forceinline__ void run(const Part& part) const {
        uint64_t policy;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        prefetch_map(w), prefetch_map(x);
        // Weights of the first chunks, which do not depend on the kernels before.
        int ahead = 0;
        for (int tile = part.tile; tile < part.tiles && ahead < a.ahead; tile += part.tile_step) {
            for (int chunk = 0; chunk < part.chunks && ahead < a.ahead; chunk++) fetch_weights(part, tile, chunk, ahead++, policy);
        }
        wait_for_previous_kernel();
        start_next_kernel();
        int slot = 0, parity = 1, index = 0;
        for (int tile = part.tile; tile < part.tiles; tile += part.tile_step) {
            for (int chunk = 0; chunk < part.chunks; chunk++, index++) {
                if (index >= ahead) {
                    mbarrier_wait(&empty[slot], parity);
                    fetch_weights(part, tile, chunk, slot, policy);
                }
                fetch_tokens(part, chunk, slot);
                if (++slot == a.stages) slot = 0, parity ^= 1;
            }
        }
    }
};

// Multiplies the chunks, in a warp group.
template <class T, int TOKENS, int CLUSTER, bool GATED>
struct Consumer {
    static constexpr int SUMS = TOKENS / 2;
    // Warps of a thread block that add the cluster's sums: those whose index % CLUSTER is its rank.
    static constexpr int OWNED = (WARPS + CLUSTER - 1) / CLUSTER;
    const SkinnyGemmArgs& a;
    Stage<T, TOKENS>* ring;
    uint64_t *full, *empty;
    Partial<TOKENS, CLUSTER>* partial;  // [2 * OWNED]
    uint64_t* arrived;                  // [2 * OWNED]
    float sums[2][SUMS];
    int slot = 0, parity = 0;

    __device__ __forceinline__ void release(int slot) const {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&empty[slot]);
    }

    // The partial sums of a tile: the products of the thread block's chunks.
    __device__ __forceinline__ void products(const Part& part) {
        int last = -1;
        for (int chunk = 0; chunk < part.chunks; chunk++) {
            mbarrier_wait(&full[slot], parity);
            const uint64_t x = swizzled_descriptor(ring[slot].x, 0);
            const uint64_t w[2] = {swizzled_descriptor(ring[slot].w[0], 0), swizzled_descriptor(ring[slot].w[1], 0)};
            pin(sums[0]), pin(sums[1]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLUMNS / 16; k++) {
#pragma unroll
                for (int box = 0; box < 2; box++) wgmma_ss<T, TOKENS>(sums[box], w[box] + 2 * k, x + 2 * k, chunk + k > 0);
            }
            wgmma_commit();
            if (last >= 0) {
                wgmma_wait<1>();
                release(last);
            }
            last = slot;
            if (++slot == a.stages) slot = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        pin(sums[0]), pin(sums[1]);
        if (last >= 0) release(last);
        if (part.chunks == 0) {
#pragma unroll
            for (int i = 0; i < 2 * SUMS; i++) sums[i / SUMS][i % SUMS] = 0.f;
        }
    }

    // Adds the cluster's sums for a warp's rows, in one of the thread blocks. The warps of the others send
    // theirs and return false. The warps of a thread block begin a tile together. So two buffers
    // suffice: a thread block that sends to one has got the sums of the tile before, which the receiver
    // sent after it had read the buffer.
    __device__ __forceinline__ bool reduce(int buffer, int phase) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank();
        const int owner = warp % CLUSTER, own = buffer * OWNED + warp / CLUSTER;
        if (owner != rank) {
            const int place = rank - (rank > owner);
            const uint32_t to = remote_address(&partial[own].of_rank[place][0][lane], owner), barrier = remote_address(&arrived[own], owner);
#pragma unroll
            for (int i = 0; i < 2 * SUMS; i += 4) {
                const float four[4] = {sums[i / SUMS][i % SUMS], sums[i / SUMS][i % SUMS + 1], sums[i / SUMS][i % SUMS + 2], sums[i / SUMS][i % SUMS + 3]};
                store_remote(to + i / 4 * 32 * sizeof(float4), four, barrier);
            }
            return false;
        }
        if (lane == 0) mbarrier_expect(&arrived[own], sizeof(Partial<TOKENS, CLUSTER>));
        __syncwarp();
        mbarrier_wait(&arrived[own], phase);
#pragma unroll
        for (int other = 0; other < CLUSTER - 1; other++) {
#pragma unroll
            for (int i = 0; i < 2 * SUMS; i += 4) {
                const float4 four = partial[own].of_rank[other][i / 4][lane];
                float* mine = &sums[i / SUMS][i % SUMS];
                mine[0] += four.x, mine[1] += four.y, mine[2] += four.z, mine[3] += four.w;
            }
        }
        return true;
    }

    __device__ __forceinline__ void put(int token, int output, float x) const {
        if (token < a.tokens && output < a.outputs) narrow(reinterpret_cast<T*>(a.y)[int64_t(token) * a.outputs + output], x);
    }

    // Stores the warp's rows. Number i of a thread belongs to row lane / 4 (+ 8) and to tokens 2 (lane
    // % 4), + 1, + 8 and so on.
    __device__ __forceinline__ void store(int tile) const {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2, output = row + i / 2 % 2 * 8;
            if constexpr (GATED) {
                // Rounded first, as between separate launches.
                T gate, up;
                narrow(gate, sums[0][i]), narrow(up, sums[1][i]);
                put(token, tile * BOX + output, silu(widen(gate)) * widen(up));
            } else {
                put(token, tile * 2 * BOX + output, sums[0][i]);
                put(token, tile * 2 * BOX + BOX + output, sums[1][i]);
            }
        }
    }

    __device__ __forceinline__ void run(const Part& part) {
        int count = 0;
        for (int tile = part.tile; tile < part.tiles; tile += part.tile_step, count++) {
            named_sync(1, CONSUMERS);
            products(part);
            // The barriers of all thread blocks of the cluster are initialized.
            if (count == 0) cluster_wait();
            if (reduce(count % 2, count / 2 % 2)) store(tile);
        }
        if (count == 0) cluster_wait();
    }
};

template <class T, int TOKENS, int CLUSTER, bool GATED>
__device__ __forceinline__ void skinny_gemm(const SkinnyGemmArgs& a, const CUtensorMap* w, const CUtensorMap* x) {
    extern __shared__ uint8_t raw[];
    Stage<T, TOKENS>* ring = reinterpret_cast<Stage<T, TOKENS>*>((uintptr_t(raw) + 1023) / 1024 * 1024);
    using Sums = Consumer<T, TOKENS, CLUSTER, GATED>;
    Partial<TOKENS, CLUSTER>* partial = reinterpret_cast<Partial<TOKENS, CLUSTER>*>(ring + a.stages);
    uint64_t *full = reinterpret_cast<uint64_t*>(partial + 2 * Sums::OWNED), *empty = full + a.stages, *arrived = empty + a.stages;
    if (threadIdx.x == CONSUMERS) {
        for (int i = 0; i < a.stages; i++) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], CONSUMERS / 32);
        for (int i = 0; i < 2 * Sums::OWNED; i++) mbarrier_init(&arrived[i], 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_arrive();
    const Part part(a, CLUSTER, GATED);
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) Producer<T, TOKENS, GATED>{a, w, x, ring, full, empty}.run(part);
        __syncwarp();
        cluster_wait();
    } else {
        Sums{a, ring, full, empty, partial, arrived}.run(part);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CLUSTERS_OF(CLUSTER) __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERS_OF(CLUSTER)
#endif
// Other devices have the kernels, but no code.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BODY(TYPE, TOKENS, CLUSTER, GATED) skinny_gemm<TYPE, TOKENS, CLUSTER, GATED>(a, &w, &x)
#else
#define BODY(TYPE, TOKENS, CLUSTER, GATED)
#endif

// Grid: thread blocks, a multiple of CLUSTER; at most as many as run at the same time.
#define KERNEL(NAME, TYPE, TOKENS, CLUSTER, GATED)                                                                                       \
    extern "C" __global__ void CLUSTERS_OF(CLUSTER) __launch_bounds__(THREADS, 1)                                                        \
        NAME(const __grid_constant__ SkinnyGemmArgs a, const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap x) {   \
        BODY(TYPE, TOKENS, CLUSTER, GATED);                                                                                              \
    }
#define KERNELS(FORMAT, TYPE, TOKENS, CLUSTER)                                          \
    KERNEL(skinny_gemm_##FORMAT##_t##TOKENS##_c##CLUSTER, TYPE, TOKENS, CLUSTER, false) \
    KERNEL(skinny_gemm_gated_##FORMAT##_t##TOKENS##_c##CLUSTER, TYPE, TOKENS, CLUSTER, true)
#define CLUSTERS(TOKENS, CLUSTER)                \
    KERNELS(f16, __half, TOKENS, CLUSTER)        \
    KERNELS(bf16, __nv_bfloat16, TOKENS, CLUSTER)
#define ALL(TOKENS) CLUSTERS(TOKENS, 3) CLUSTERS(TOKENS, 4)
ALL(8)
ALL(16)
ALL(32)

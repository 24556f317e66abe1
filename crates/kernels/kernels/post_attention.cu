// The part of a decoder between two attentions, for one or two tokens, in one launch: output projection,
// residual, norm, gated feed-forward block, residual, norm, and the product after it.
//
// Reading the weights takes most of the time, and their order does not depend on the activations.
// So each warp copies its weights ahead to a ring in shared memory, across the boundaries of the
// products. Memory stays busy while thread blocks wait for each other.
//
// Results equal those of separate launches of matvec, rms_norm and silu_mul bit for bit: sums have
// the same order, and the same intermediate results are rounded.
#include <cooperative_groups.h>
#include <dependent.cuh>
#include <cstddef>
#include <cstdint>
#include "half.cuh"

// Addresses are device addresses. All arrays are contiguous, in f16 or bf16.
struct PostAttentionArgs {
    uint64_t attention;  // [rows, attention_size]
    uint64_t residual;   // [rows, hidden]
    uint64_t output;     // [hidden, attention_size]
    uint64_t norm;       // [hidden]
    uint64_t gate_up;    // [2 inner, hidden]
    uint64_t down;       // [hidden, inner]
    uint64_t next_norm;  // [hidden]
    uint64_t next;       // [next_size, hidden]
    uint64_t middle;     // Workspace: [rows, hidden], the residual stream after attention
    uint64_t gated;      // Workspace: [rows, inner], the input of `down`
    uint64_t sum;        // Output: [rows, hidden], the residual stream after the feed-forward block
    uint64_t y;          // Output: [rows, next_size]
    int32_t attention_size, hidden, inner, next_size;  // Multiples of 8, but for next_size
    int32_t rows;                                      // At most the kernel's COUNT
    int32_t stages;                                    // Chunks of a warp's ring
    float eps;
    int32_t unused;
};
static_assert(sizeof(PostAttentionArgs) == 128 && offsetof(PostAttentionArgs, rows) == 112, "as in src/post_attention/one_launch.rs");

constexpr int THREADS = 512, WARPS = THREADS / 32;
// Columns of a chunk of weights.
constexpr int CHUNK = 512;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void init(uint64_t& barrier) { asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barrier))); }

__device__ __forceinline__ void expect(uint64_t& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

// Copies weights, which are read once, so they should leave the L2 cache first.
__device__ __forceinline__ void copy(uint4* to, const uint4* from, int bytes, uint64_t& barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(policy) : "memory");
}

// The products, in their order.
enum Step { OUTPUT, GATE_UP, DOWN, NEXT, STEPS };

// A product with a matrix [out, inner]. A warp computes a unit of two outputs at a time: 2 unit and
// 2 unit + 1, or the gate and the up projection of a channel.
struct Product {
    Step step;
    uint64_t w;
    int inner, out;

    __device__ __forceinline__ Product(const PostAttentionArgs& a, Step step) : step(step) {
        w = step == OUTPUT ? a.output : step == GATE_UP ? a.gate_up : step == DOWN ? a.down : a.next;
        inner = step == OUTPUT ? a.attention_size : step == DOWN ? a.inner : a.hidden;
        out = step == GATE_UP ? 2 * a.inner : step == NEXT ? a.next_size : a.hidden;
    }

    __device__ __forceinline__ int units() const { return (out + 1) / 2; }
    __device__ __forceinline__ int row(int unit, int second) const { return step == GATE_UP ? unit + second * (out / 2) : min(2 * unit + second, out - 1); }
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
// A warp's units. Consecutive ones belong to different thread blocks.
__device__ __forceinline__ int first_unit() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
__device__ __forceinline__ int unit_step() { return gridDim.x * WARPS; }

// Up to CHUNK columns of a unit's two rows.
struct Chunk {
    uint4 rows[2][CHUNK / 8];
};

// A warp's ring of chunks, which lane 0 fills in the order in which the warp multiplies them.
struct Ring {
    const PostAttentionArgs& a;
    Chunk* chunks;
    uint64_t* barriers;
    uint64_t policy;
    int slot = 0, parity = 0;
    // The next chunk to copy. Only lane 0 has it.
    int step = -1, unit = 0, units = 0, column = 0, inner = 0;
    const uint4* rows[2];

    __device__ __forceinline__ Ring(const PostAttentionArgs& a, Chunk* chunks, uint64_t* barriers) : a(a), chunks(chunks), barriers(barriers) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        if (lane() == 0) {
            for (int s = 0; s < a.stages; s++) init(barriers[s]);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            advance();
            for (int s = 0; s < a.stages; s++) fetch(s);
        }
        __syncwarp();
    }

    // Moves to the next unit.
    __device__ __forceinline__ void advance() {
        unit += unit_step(), column = 0;
        while (unit >= units) {
            if (++step == STEPS) return;
            unit = first_unit(), units = Product(a, Step(step)).units();
        }
        const Product p(a, Step(step));
        inner = p.inner;
#pragma unroll
        for (int o = 0; o < 2; o++) rows[o] = reinterpret_cast<const uint4*>(p.w) + int64_t(p.row(unit, o)) * (inner / 8);
    }

    // Starts copying the next chunk to a slot, if there is one.
    __device__ __forceinline__ void fetch(int s) {
        if (step == STEPS) return;
        const int bytes = 2 * min(CHUNK, inner - column);
        expect(barriers[s], 2 * bytes);
#pragma unroll
        for (int o = 0; o < 2; o++) copy(chunks[s].rows[o], rows[o] + column / 8, bytes, barriers[s], policy);
        column += CHUNK;
        if (column >= inner) advance();
    }

    __device__ __forceinline__ const Chunk& front() {
        wait(barriers[slot], parity);
        return chunks[slot];
    }

    __device__ __forceinline__ void pop() {
        __syncwarp();
        if (lane() == 0) fetch(slot);
        if (++slot == a.stages) slot = 0, parity ^= 1;
    }
};

// The activations that are multiplied, [rows, inner], in shared memory.
template <class Pair>
struct Input {
    // Threads of the kernel rms_norm, whose order of sums `norm` follows.
    static constexpr int NORM_THREADS = 512;
    static_assert(THREADS == NORM_THREADS);

    uint4* x;
    float* squares;  // [WARPS]

    // Other thread blocks may have written `from` during this launch, so it is not read through L1.
    __device__ __forceinline__ void load(uint64_t from, int pieces) const {
        constexpr int LOADS = 4;
        for (int start = threadIdx.x; start < pieces; start += LOADS * THREADS) {
            uint4 piece[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                if (start + i * THREADS < pieces) piece[i] = __ldcg(reinterpret_cast<const uint4*>(from) + start + i * THREADS);
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                if (start + i * THREADS < pieces) x[start + i * THREADS] = piece[i];
        }
    }

    // Replaces a row by its norm.
    __device__ __forceinline__ void norm(uint4* row, uint64_t weights, int columns, float eps) const {
        float square = 0.f;
        for (int i = threadIdx.x; i < columns / 8; i += THREADS) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 s = widen(reinterpret_cast<const Pair*>(row + i)[j]);
                square = fmaf(s.x, s.x, fmaf(s.y, s.y, square));
            }
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) square += __shfl_xor_sync(~0u, square, i);
        if (lane() == 0) squares[threadIdx.x / 32] = square;
        __syncthreads();
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) all += squares[i];
        const float scale = rsqrtf(all / columns + eps);
        for (int i = threadIdx.x; i < columns / 8; i += THREADS) {
            const uint4 weight = __ldg(reinterpret_cast<const uint4*>(weights) + i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Pair& pair = reinterpret_cast<Pair*>(row + i)[j];
                const float2 s = widen(pair), t = widen(reinterpret_cast<const Pair*>(&weight)[j]);
                narrow(pair, make_float2(s.x * scale * t.x, s.y * scale * t.y));
            }
        }
        __syncthreads();
    }

    template <Step STEP>
    __device__ __forceinline__ void prepare(const PostAttentionArgs& a, int inner) const {
        load(STEP == OUTPUT ? a.attention : STEP == GATE_UP ? a.middle : STEP == DOWN ? a.gated : a.sum, a.rows * inner / 8);
        __syncthreads();
        if constexpr (STEP == GATE_UP || STEP == NEXT)
            for (int r = 0; r < a.rows; r++) norm(x + r * (inner / 8), STEP == GATE_UP ? a.norm : a.next_norm, inner, a.eps);
    }
};

// Adds the products of a chunk's weights with x, [rows, inner] from the chunk's first column on.
template <class Pair, int COUNT>
__device__ __forceinline__ void multiply(const Chunk& weights, const uint4* x, int rows, int inner, int columns, float (&sums)[COUNT][2]) {
#pragma unroll
    for (int s = 0; s < CHUNK / 256; s++) {
        const int i = 32 * s + lane();
        if (8 * i >= columns) break;
        float wide[2][8];
#pragma unroll
        for (int o = 0; o < 2; o++) widen<Pair>(wide[o], weights.rows[o][i]);
#pragma unroll
        for (int r = 0; r < COUNT; r++) {
            float row[8];
            widen<Pair>(row, x[min(r, rows - 1) * (inner / 8) + i]);
#pragma unroll
            for (int o = 0; o < 2; o++)
#pragma unroll
                for (int j = 0; j < 8; j++) sums[r][o] = fmaf(row[j], wide[o][j], sums[r][o]);
        }
    }
}

// Rounds a product, and adds it to an element of the residual stream.
template <class One>
__device__ __forceinline__ void add(uint64_t to, uint64_t residual, int64_t at, float product) {
    One y;
    narrow(y, product);
    narrow(reinterpret_cast<One*>(to)[at], widen(__ldcg(reinterpret_cast<const One*>(residual) + at)) + widen(y));
}

template <class One, Step STEP, int COUNT>
__device__ __forceinline__ void store(const PostAttentionArgs& a, const Product& p, int unit, float (&sums)[COUNT][2]) {
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
#pragma unroll
        for (int o = 0; o < 2; o++)
#pragma unroll
            for (int k = 16; k > 0; k /= 2) sums[r][o] += __shfl_xor_sync(~0u, sums[r][o], k);
        if (r >= a.rows || lane() >= 2) continue;
        const float sum = lane() ? sums[r][1] : sums[r][0];
        const int64_t at = int64_t(r) * p.out + p.row(unit, lane());
        if (STEP == OUTPUT) add<One>(a.middle, a.residual, at, sum);
        if (STEP == DOWN) add<One>(a.sum, a.middle, at, sum);
        if (STEP == NEXT) narrow(reinterpret_cast<One*>(a.y)[at], sum);
        if (STEP == GATE_UP && lane() == 0) {
            One gate, up;
            narrow(gate, sums[r][0]), narrow(up, sums[r][1]);
            narrow(reinterpret_cast<One*>(a.gated)[int64_t(r) * a.inner + unit], silu(widen(gate)) * widen(up));
        }
    }
}

template <class Pair, class One, int COUNT, Step STEP>
__device__ __forceinline__ void run(const PostAttentionArgs& a, const Input<Pair>& input, Ring& ring) {
    const Product p(a, STEP);
    input.template prepare<STEP>(a, p.inner);
    for (int unit = first_unit(); unit < p.units(); unit += unit_step()) {
        float sums[COUNT][2] = {};
        for (int column = 0; column < p.inner; column += CHUNK) {
            multiply<Pair>(ring.front(), input.x + column / 8, a.rows, p.inner, p.inner - column, sums);
            ring.pop();
        }
        store<One, STEP>(a, p, unit, sums);
    }
    if (STEP != NEXT) cooperative_groups::this_grid().sync();
}

// Dynamic shared memory: the warps' rings, their barriers, and the largest input. Grid: a thread
// block per multiprocessor, launched cooperatively.
template <class Pair, class One, int COUNT>
__device__ __forceinline__ void post_attention(const PostAttentionArgs& a) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float squares[WARPS];
    Chunk* chunks = reinterpret_cast<Chunk*>(shared);
    uint64_t* barriers = reinterpret_cast<uint64_t*>(chunks + WARPS * a.stages);
    const int first = threadIdx.x / 32 * a.stages;
    const Input<Pair> input{reinterpret_cast<uint4*>(barriers + WARPS * a.stages), squares};
    start_next_kernel();
    Ring ring(a, chunks + first, barriers + first);
    wait_for_previous_kernel();
    run<Pair, One, COUNT, OUTPUT>(a, input, ring);
    run<Pair, One, COUNT, GATE_UP>(a, input, ring);
    run<Pair, One, COUNT, DOWN>(a, input, ring);
    run<Pair, One, COUNT, NEXT>(a, input, ring);
}

// Devices before compute capability 9.0 have no bulk copies.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BODY(PAIR, ONE, ROWS) post_attention<PAIR, ONE, ROWS>(a)
#else
#define BODY(PAIR, ONE, ROWS) __trap()
#endif
#define KERNEL(NAME, PAIR, ONE, ROWS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) post_attention_##NAME##_r##ROWS(const __grid_constant__ PostAttentionArgs a) { \
        BODY(PAIR, ONE, ROWS);                                                                                                       \
    }
#define FORMATS(ROWS) KERNEL(f16, __half2, __half, ROWS) KERNEL(bf16, __nv_bfloat162, __nv_bfloat16, ROWS)
FORMATS(1)
FORMATS(2)

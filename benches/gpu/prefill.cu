// Compares the prefill kernels of core with a plain one, and times them. Needs only CUDA.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I crates/kernels \
//         -o prefill benches/gpu/prefill.cu
//     ./prefill check
//
// `-arch=sm_90 -DNO_WGMMA` instead of `-gencode ...` builds the kernels for devices without wgmma.
// `small` instead of `check` runs only short lengths, for compute-sanitizer; a head_dim after it
// runs only this head_dim. `time` and `brief` measure.
//
// The reference computes softmax attention row by row in f64 from contiguous keys. It shares
// neither tiles nor arithmetic with the kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <cudaTypedefs.h>

#include "kernels/prefill.cu"

void ok(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define OK(call) ok(call, __LINE__)
typedef long long i64;

// ---- Launches: the host side in C++ ----

#ifdef NO_WGMMA
constexpr bool WGMMA = false;
#else
constexpr bool WGMMA = true;
#endif

struct Kernel {
    const void* function;
    int rows, threads, shared_bytes;
};
template <class T, int D>
Kernel kernel_of(const void* wgmma, const void* mma) {
    if (WGMMA) return {wgmma, WgmmaShape<D>::ROWS, WgmmaShape<D>::THREADS, WgmmaShape<D>::SHARED_BYTES};
    return {mma, MmaShape<D>::ROWS, MMA_THREADS, MmaShape<D>::SHARED_BYTES};
}
Kernel kernel(int d, bool bf16) {
#define OF(D)                                                                                                                       \
    if (d == D)                                                                                                                     \
        return bf16 ? kernel_of<__nv_bfloat16, D>((const void*)prefill_wgmma_bf16_d##D, (const void*)prefill_mma_bf16_d##D)         \
                    : kernel_of<__half, D>((const void*)prefill_wgmma_f16_d##D, (const void*)prefill_mma_f16_d##D);
    OF(64) OF(80) OF(96) OF(128) OF(192) OF(256)
#undef OF
    printf("no kernel for head_dim %d\n", d);
    exit(1);
}

// The largest number of a group's heads that leaves at most 1 of 16 rows of a tile unused.
int heads_of_a_tile(int group, int rows) {
    for (int pack = std::min(group, rows); pack > 1; pack--)
        if (group % pack == 0 && rows / pack * pack * 16 >= rows * 15) return pack;
    return 1;
}

// A tensor map of rank 3: the elements of a row, rows, and an outer dimension. Strides are in
// elements.
CUtensorMap tensor_map(uint64_t address, bool bf16, int d, i64 extent1, i64 stride1, i64 extent2, i64 stride2, int box1, int box2) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    cuuint64_t extents[3] = {cuuint64_t(d), cuuint64_t(extent1), cuuint64_t(extent2)}, strides[2] = {cuuint64_t(stride1 * 2), cuuint64_t(stride2 * 2)};
    cuuint32_t box[3] = {64, cuuint32_t(box1), cuuint32_t(box2)}, steps[3] = {1, 1, 1};
    CUresult result = encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, (void*)address, extents, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) printf("cuTensorMapEncodeTiled: %d\n", result), exit(1);
    return map;
}

void launch(PrefillArgs a, int d, bool bf16, cudaStream_t stream) {
    const Kernel k = kernel(d, bf16);
    a.pack = heads_of_a_tile(a.heads / a.kv_heads, k.rows);
    const int tokens = k.rows / a.pack, blocks = (a.tokens / tokens + a.seqs) * (a.heads / a.pack);
    OK(cudaFuncSetAttribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_bytes));
    if (!WGMMA) {
        void* arguments[] = {&a};
        OK(cudaLaunchKernel(k.function, dim3(blocks), dim3(k.threads), arguments, k.shared_bytes, stream));
        return;
    }
    CUtensorMap q = tensor_map(a.q, bf16, d, a.heads, a.q_head, a.tokens, a.q_token, a.pack, tokens);
    auto keys = [&](uint64_t address, i64 token, i64 head) {
        return a.block_table ? tensor_map(address, bf16, d, PAGE, token, a.kv_extent, head, PAGE, 1)
                             : tensor_map(address, bf16, d, a.kv_extent, token, a.kv_heads, head, PAGE, 1);
    };
    CUtensorMap kmap = keys(a.k, a.k_token, a.k_head), vmap = keys(a.v, a.v_token, a.v_head);
    void* arguments[] = {&a, &q, &kmap, &vmap};
    OK(cudaLaunchKernel(k.function, dim3(blocks), dim3(k.threads), arguments, k.shared_bytes, stream));
}

// ---- Inputs and the reference ----

template <class T>
struct Buffer {
    T* p = nullptr;
    size_t n = 0;
    T* take(size_t count) {
        if (count > n) {
            if (p) OK(cudaFree(p));
            OK(cudaMalloc(&p, count * sizeof(T)));
            n = count;
        }
        return p;
    }
    T* put(const std::vector<T>& from) {
        take(from.size() + 1);
        OK(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
        return p;
    }
};

__device__ float noise(unsigned long long i) {  // Normal numbers from a hash of the index.
    i += 0x9e3779b97f4a7c15ull, i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9ull, i = (i ^ i >> 27) * 0x94d049bb133111ebull, i ^= i >> 31;
    const float u = ((i & 0xffffff) + 1) * (1.f / 16777216.f), v = (i >> 24 & 0xffffff) * (1.f / 16777216.f);
    return sqrtf(-2.f * logf(u)) * cospif(2.f * v);
}
__device__ float number(const void* p, i64 i, bool bf16) {
    return bf16 ? __bfloat162float(((const __nv_bfloat16*)p)[i]) : __half2float(((const __half*)p)[i]);
}
__global__ void fill(uint16_t* x, i64 n, float spread, bool bf16, unsigned long long seed) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        const float y = spread * noise(seed * 0x100000000ull + i);
        if (bf16) ((__nv_bfloat16*)x)[i] = __float2bfloat16(y);
        else ((__half*)x)[i] = __float2half(y);
    }
}
// Copies contiguous keys of one sequence and kv head into its pages.
__global__ void to_pages(const uint16_t* from, i64 token_stride, uint16_t* to, const uint32_t* table, int keys, int d) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < keys * d; i += gridDim.x * blockDim.x)
        to[((i64)table[i / d / PAGE] * PAGE + i / d % PAGE) * d + i % d] = from[i / d * token_stride + i % d];
}

struct Plain {
    const uint16_t *q, *k, *v;
    i64 q_token, q_head, k_token, k_head, v_token, v_head;
    int heads, group, d, first_query, queries, first_key, causal, past, window;
    const int* keys;  // [kv_heads]
    bool bf16;
    double scale, soft_cap;
    double *out, *lse;
};
__global__ void plain(Plain a) {
    extern __shared__ double s[];
    __shared__ double shared;
    const int i = blockIdx.x, head = blockIdx.y, kv = head / a.group, keys = a.keys[kv];
    const int position = i + (a.past ? keys : keys - a.queries), token = a.first_query + i;
    for (int j = threadIdx.x; j < keys; j += blockDim.x) {
        double dot = 0;
        for (int c = 0; c < a.d; c++)
            dot += (double)number(a.q, token * a.q_token + head * a.q_head + c, a.bf16) * number(a.k, (a.first_key + j) * a.k_token + kv * a.k_head + c, a.bf16);
        dot *= a.scale;
        if (a.soft_cap > 0) dot = a.soft_cap * tanh(dot / a.soft_cap);
        const bool seen = !(a.causal && j > position) && !(a.window && j <= position - a.window);
        s[j] = seen ? dot : -INFINITY;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double top = -INFINITY, sum = 0;
        for (int j = 0; j < keys; j++) top = fmax(top, s[j]);
        for (int j = 0; j < keys && top > -INFINITY; j++) sum += exp(s[j] - top);
        shared = top + log(sum);
        a.lse[token * (i64)a.heads + head] = top > -INFINITY ? shared : -INFINITY;
        if (top == -INFINITY) shared = INFINITY;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < keys; j += blockDim.x) s[j] = exp(s[j] - shared);
    __syncthreads();
    for (int c = threadIdx.x; c < a.d; c += blockDim.x) {
        double sum = 0;
        for (int j = 0; j < keys; j++)
            if (s[j] > 0) sum += s[j] * number(a.v, (a.first_key + j) * a.v_token + kv * a.v_head + c, a.bf16);
        a.out[(token * (i64)a.heads + head) * a.d + c] = sum;
    }
}

// ---- Checks ----

struct Case {
    std::vector<int> queries, keys;  // Of each sequence
    int heads, kv_heads, d;
    bool bf16, causal = true, past = false, paged = false, fused = false, poison = false, out_f32 = false;
    int window = 0;
    double soft_cap = 0;
};

std::vector<uint32_t> sums(const std::vector<int>& x) {
    std::vector<uint32_t> y = {0};
    for (int n : x) y.push_back(y.back() + n);
    return y;
}

struct Worst {
    double out[2] = {}, lse = 0;
    int cases = 0, failures = 0;
} worst;

void check(const Case& c) {
    // outb: two for each number if it is f32
    static Buffer<uint16_t> qb, kb, vb, outb, pool_k, pool_v;
    static Buffer<float> lseb;
    static Buffer<double> ref_out, ref_lse;
    static Buffer<uint32_t> cu_q, cu_k, table, lens;
    static Buffer<int> keys_of;
    static unsigned long long seed = 1;
    const auto cq = sums(c.queries), ck = sums(c.keys);
    const int seqs = c.queries.size(), tokens = cq.back(), kv_tokens = ck.back(), group = c.heads / c.kv_heads;

    PrefillArgs a = {};
    a.q_head = a.k_head = a.v_head = c.d;
    a.q_token = (i64)c.heads * c.d, a.k_token = a.v_token = (i64)c.kv_heads * c.d;
    uint16_t *q, *k, *v;
    auto random = [&](uint16_t* p, i64 n, float spread) { fill<<<512, 256>>>(p, n, spread, c.bf16, seed++); };
    if (c.fused) {
        a.q_token = a.k_token = a.v_token = (i64)(c.heads + 2 * c.kv_heads) * c.d;
        q = qb.take(a.q_token * tokens + 64), random(q, a.q_token * tokens, 1.7f);
        k = q + c.heads * c.d, v = k + c.kv_heads * c.d;
    } else {
        q = qb.take(a.q_token * tokens + 64), random(q, a.q_token * tokens, 3.f);
        k = kb.take(a.k_token * kv_tokens + 64), random(k, a.k_token * kv_tokens, 1.f);
        v = vb.take(a.v_token * kv_tokens + 64), random(v, a.v_token * kv_tokens, 1.f);
    }
    // Keys and values of every second sequence are NaN, and must not affect the results of the
    // others.
    if (c.poison)
        for (int s = 1; s < seqs; s += 2) {
            OK(cudaMemset(k + ck[s] * a.k_token, 0xff, a.k_token * c.keys[s] * 2));
            OK(cudaMemset(v + ck[s] * a.v_token, 0xff, a.v_token * c.keys[s] * 2));
        }

    // Heads of a paged cache may differ.
    std::vector<std::vector<int>> keys(seqs, std::vector<int>(c.kv_heads));
    int longest = 0;
    for (int s = 0; s < seqs; s++)
        for (int h = 0; h < c.kv_heads; h++) keys[s][h] = c.paged ? std::max(0, c.keys[s] - 37 * (h % 3)) : c.keys[s], longest = std::max(longest, keys[s][h]);

    // The reference.
    Plain p = {q, k, v, a.q_token, a.q_head, a.k_token, a.k_head, a.v_token, a.v_head, c.heads, group, c.d};
    p.causal = c.causal, p.past = c.past, p.window = c.window, p.bf16 = c.bf16, p.scale = 1 / std::sqrt((double)c.d), p.soft_cap = c.soft_cap;
    const i64 outs = (i64)tokens * c.heads * c.d, rows = (i64)tokens * c.heads;
    p.out = ref_out.take(outs + 1), p.lse = ref_lse.take(rows + 1);
    OK(cudaFuncSetAttribute(plain, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
    for (int s = 0; s < seqs; s++) {
        p.first_query = cq[s], p.queries = c.queries[s], p.first_key = ck[s], p.keys = keys_of.put(keys[s]);
        if (c.queries[s]) plain<<<dim3(c.queries[s], c.heads), 256, longest * 8 + 8>>>(p);
        OK(cudaGetLastError());
        OK(cudaDeviceSynchronize());
    }

    // The kernel in a captured graph, with outputs and unused parts of pages filled with NaN.
    a.q = (uint64_t)q, a.k = (uint64_t)k, a.v = (uint64_t)v, a.kv_extent = kv_tokens;
    if (c.paged) {
        const int blocks = (longest + PAGE - 1) / PAGE + 1;
        std::vector<uint32_t> entries(seqs * c.kv_heads * blocks, 0xffffffffu), flat;
        uint32_t used = 0, all = 0;
        for (auto& s : keys) for (int n : s) all += (n + PAGE - 1) / PAGE, flat.push_back(n);
        // Nearly coprime, so that pages are not in order.
        const uint32_t extent = all + 3, stride = 7;
        std::vector<uint32_t> order(extent);
        for (uint32_t i = 0; i < extent; i++) order[i] = i;
        for (uint32_t i = extent; i > 1; i--) std::swap(order[i - 1], order[(i * 2654435761u + stride) % i]);
        pool_k.take((size_t)extent * PAGE * c.d), pool_v.take((size_t)extent * PAGE * c.d);
        OK(cudaMemset(pool_k.p, 0xff, (size_t)extent * PAGE * c.d * 2));
        OK(cudaMemset(pool_v.p, 0xff, (size_t)extent * PAGE * c.d * 2));
        for (int i = 0; i < seqs * c.kv_heads; i++)
            for (int b = 0; b < (keys[i / c.kv_heads][i % c.kv_heads] + PAGE - 1) / PAGE; b++) entries[i * blocks + b] = order[used++];
        table.put(entries);
        for (int i = 0; i < seqs * c.kv_heads; i++) {
            const int s = i / c.kv_heads, h = i % c.kv_heads;
            to_pages<<<64, 256>>>(k + ck[s] * a.k_token + h * a.k_head, a.k_token, pool_k.p, table.p + i * blocks, keys[s][h], c.d);
            to_pages<<<64, 256>>>(v + ck[s] * a.v_token + h * a.v_head, a.v_token, pool_v.p, table.p + i * blocks, keys[s][h], c.d);
        }
        a.k = (uint64_t)pool_k.p, a.v = (uint64_t)pool_v.p, a.k_token = a.v_token = c.d, a.k_head = a.v_head = PAGE * c.d;
        a.kv_extent = extent, a.block_table = (uint64_t)table.p, a.seqlens_k = (uint64_t)lens.put(flat);
        a.table_head = blocks, a.table_seq = (i64)blocks * c.kv_heads, a.lens_head = 1, a.lens_seq = c.kv_heads;
    }
    const int words = c.out_f32 ? 2 : 1;  // Of 16 bits, of an output
    OK(cudaMemset(outb.take(words * outs + 64), 0xff, (words * outs + 64) * 2));
    OK(cudaMemset(lseb.take(rows + 64), 0xff, (rows + 64) * 4));
    a.out = (uint64_t)outb.p, a.lse = (uint64_t)lseb.p;
    cu_q.take(seqs + 2), cu_k.take(seqs + 2);
    a.cu_seqlens_q = (uint64_t)cu_q.p, a.cu_seqlens_k = (uint64_t)cu_k.p;
    a.seqs = seqs, a.tokens = tokens, a.heads = c.heads, a.kv_heads = c.kv_heads;
    a.causal = c.causal, a.past = c.past, a.window = c.window, a.scale = p.scale, a.soft_cap = c.soft_cap, a.out_f32 = c.out_f32;
    static cudaStream_t stream = [] { cudaStream_t s; OK(cudaStreamCreate(&s)); return s; }();
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    OK(cudaDeviceSynchronize());
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch(a, c.d, c.bf16, stream);
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&replay, graph, 0));
    cu_q.put(cq), cu_k.put(ck);  // Lengths come after the capture.
    OK(cudaGraphLaunch(replay, stream));
    OK(cudaStreamSynchronize(stream));
    OK(cudaGraphExecDestroy(replay));
    OK(cudaGraphDestroy(graph));

    std::vector<uint16_t> out(words * outs + 64);
    std::vector<float> lse(rows + 64);
    std::vector<double> want(outs), want_lse(rows);
    OK(cudaMemcpy(out.data(), outb.p, out.size() * 2, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(lse.data(), lseb.p, lse.size() * 4, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(want.data(), p.out, outs * 8, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(want_lse.data(), p.lse, rows * 8, cudaMemcpyDeviceToHost));
    double error = 0, norm = 0, row_worst = 0, lse_worst = 0;
    bool beyond = false, unlike = false;
    for (int i = 0; i < 64; i++) beyond |= out[words * outs + i] != 0xffff || *(uint32_t*)&lse[rows + i] != 0xffffffffu;
    for (i64 r = 0; r < rows; r++) {
        const int token = r / c.heads;
        const int s = std::upper_bound(cq.begin(), cq.end(), (uint32_t)token) - cq.begin() - 1;
        if (c.poison && s % 2) continue;
        double e = 0, n = 0;
        for (int j = 0; j < c.d; j++) {
            const i64 at = r * c.d + j;
            float x;
            if (c.out_f32) memcpy(&x, &out[2 * at], 4);
            else if (c.bf16) { const uint32_t wide = (uint32_t)out[at] << 16; memcpy(&x, &wide, 4); }
            else { __half h; memcpy(&h, &out[at], 2); x = __half2float(h); }
            const double y = want[at];
            e += (x - y) * (x - y), n += y * y;
        }
        error += e, norm += n;
        if (!(e <= 1e30)) unlike = true;
        if (n > 0) row_worst = std::max(row_worst, std::sqrt(e / n));
        else if (e != 0) unlike = true;
        if (std::isinf(want_lse[r]) || std::isinf(lse[r])) unlike |= want_lse[r] != lse[r];
        else {
            const double difference = std::fabs(lse[r] - want_lse[r]);
            if (!(difference < 1e30)) unlike = true;
            lse_worst = std::max(lse_worst, difference);
        }
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : 0, limit = c.bf16 ? 6e-3 : 1e-3;
    const bool bad = beyond || unlike || !(relative < limit) || !(row_worst < 4 * limit) || !(lse_worst < 1e-3);
    worst.cases++, worst.failures += bad;
    worst.out[c.bf16] = std::max(worst.out[c.bf16], relative), worst.lse = std::max(worst.lse, lse_worst);
    if (bad && worst.failures <= 40) {
        printf("FAIL d %d %s heads %d/%d causal %d past %d paged %d fused %d poison %d f32 %d window %d cap %g: error %.2e row %.2e lse %.2e%s%s |", c.d, c.bf16 ? "bf16" : "f16",
               c.heads, c.kv_heads, c.causal, c.past, c.paged, c.fused, c.poison, c.out_f32, c.window, c.soft_cap, relative, row_worst, lse_worst, beyond ? " BEYOND" : "",
               unlike ? " UNLIKE" : "");
        for (int s = 0; s < seqs && s < 8; s++) printf(" %d/%d", c.queries[s], c.keys[s]);
        printf("\n");
    }
}

void check_all(bool small, int only) {
    const std::vector<int> alone = small ? std::vector<int>{1, 17, 65} : std::vector<int>{1, 17, 63, 64, 65, 129, 1000, 4097};
    for (int d : {64, 80, 96, 128, 192, 256})
        for (bool bf16 : {false, true}) {
            if (only && d != only) continue;
            auto with = [&](std::vector<int> queries, std::vector<int> keys, int heads, int kv_heads, auto change) {
                Case c = {queries, keys, heads, kv_heads, d, bf16};
                change(c);
                check(c);
            };
            auto same = [](Case&) {};
            auto full = [](Case& c) { c.causal = false; };
            for (int n : alone) with({n}, {n}, 4, 1, same), with({n}, {n}, 2, 2, full);
            std::vector<int> mixed = small ? std::vector<int>{5, 0, 70, 1, 33} : std::vector<int>{5, 0, 300, 1, 129, 64, 200}, more = mixed, fewer = mixed;
            for (size_t i = 0; i < mixed.size(); i++) more[i] += 50 * i + (small ? 3 : 190), fewer[i] = std::max(0, fewer[i] - 40);
            for (auto [heads, kv_heads] : {std::pair{6, 2}, {7, 1}, {8, 1}, {4, 4}, {20, 4}, {48, 1}}) {
                with(mixed, mixed, heads, kv_heads, same);
                with(mixed, mixed, heads, kv_heads, [](Case& c) { c.fused = true; });
                with(mixed, mixed, heads, kv_heads, [](Case& c) { c.out_f32 = true; });
                if (heads > 8 || (small && heads != 6)) continue;
                with(mixed, more, heads, kv_heads, same);
                with(mixed, more, heads, kv_heads, full);
                with(mixed, fewer, heads, kv_heads, same);
                with(mixed, more, heads, kv_heads, [](Case& c) { c.poison = true, c.causal = false; });
                with(mixed, more, heads, kv_heads, [](Case& c) { c.soft_cap = 5; });
                for (int window : {1, 40, 128, 333}) {
                    with(mixed, more, heads, kv_heads, [&](Case& c) { c.window = window; });
                    with(mixed, fewer, heads, kv_heads, [&](Case& c) { c.window = window, c.soft_cap = 2; });
                    with(mixed, more, heads, kv_heads, [&](Case& c) { c.window = window, c.past = true, c.paged = true; });
                }
                with(mixed, more, heads, kv_heads, [](Case& c) { c.paged = true; });
                with(mixed, more, heads, kv_heads, [](Case& c) { c.paged = true, c.past = true; });
                with(mixed, fewer, heads, kv_heads, [](Case& c) { c.paged = true, c.causal = false; });
            }
            if (small) continue;
            std::vector<int> many(100), many_keys(100);
            for (int i = 0; i < 100; i++) many[i] = i * 37 % 90, many_keys[i] = i * 61 % 200;
            with(many, many_keys, 4, 2, same);
            with({3000, 20}, {5000, 4000}, 4, 2, [](Case& c) { c.window = 1000; });
            with({3000, 20}, {5000, 4000}, 4, 2, [](Case& c) { c.paged = true; });
        }
    printf("%s: %d cases, %d failures, worst relative error f16 %.2e, bf16 %.2e, worst lse error %.2e\n", WGMMA ? "wgmma" : "mma", worst.cases, worst.failures, worst.out[0],
           worst.out[1], worst.lse);
    if (worst.failures) exit(1);
}

// ---- Times ----

void time_one(std::vector<int> lens, int heads, int kv_heads, int d, bool bf16, bool causal, int window, double soft_cap = 0, bool out_f32 = false) {
    const auto cu = sums(lens);
    const i64 tokens = cu.back(), n_q = tokens * heads * d, n_k = tokens * kv_heads * d;
    Buffer<uint16_t> q, k, v, out;
    Buffer<float> lse;
    Buffer<uint32_t> lengths;
    q.take(n_q), k.take(n_k), v.take(n_k), out.take(2 * n_q), lse.take(tokens * heads);
    fill<<<2048, 256>>>(q.p, n_q, 1, bf16, 1), fill<<<2048, 256>>>(k.p, n_k, 1, bf16, 2), fill<<<2048, 256>>>(v.p, n_k, 1, bf16, 3);
    PrefillArgs a = {};
    a.q = (uint64_t)q.p, a.k = (uint64_t)k.p, a.v = (uint64_t)v.p, a.out = (uint64_t)out.p, a.lse = (uint64_t)lse.p;
    a.cu_seqlens_q = a.cu_seqlens_k = (uint64_t)lengths.put(cu);
    a.q_head = a.k_head = a.v_head = d, a.q_token = heads * d, a.k_token = a.v_token = kv_heads * d;
    a.seqs = lens.size(), a.tokens = a.kv_extent = tokens, a.heads = heads, a.kv_heads = kv_heads;
    a.causal = causal, a.window = window, a.scale = 1 / std::sqrt((float)d), a.soft_cap = soft_cap, a.out_f32 = out_f32;
    double pairs = 0;
    for (double n : lens) pairs += !causal ? n * n : window && window < n ? window * (n - window) + window * window / 2. : n * n / 2;
    const int count = pairs > 2e9 ? 10 : 40;
    std::vector<float> ms(count);
    cudaEvent_t start, end;
    OK(cudaEventCreate(&start));
    OK(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++) launch(a, d, bf16, 0);
    for (float& x : ms) {
        OK(cudaEventRecord(start));
        launch(a, d, bf16, 0);
        OK(cudaEventRecord(end));
        OK(cudaEventSynchronize(end));
        OK(cudaEventElapsedTime(&x, start, end));
    }
    std::sort(ms.begin(), ms.end());
    const double t = ms[count / 2];
    printf("%-5s %-4s d %3d heads %2d/%2d seqs %3zu tokens %6lld %-6s window %5d cap %2g out %-5s | %9.4f ms %6.1f TFLOP/s\n", WGMMA ? "wgmma" : "mma", bf16 ? "bf16" : "f16", d, heads,
           kv_heads, lens.size(), (i64)tokens, causal ? "causal" : "full", window, soft_cap, out_f32 ? "f32" : "as q", t, 4 * pairs * d * heads / t * 1e-9);
    for (auto* b : {&q, &k, &v, &out}) OK(cudaFree(b->p));
    OK(cudaFree(lse.p));
    OK(cudaFree(lengths.p));
}

void time_all(bool brief) {
    for (int n : {8192, 32768}) time_one({n}, 32, 8, 128, true, true, 0);
    time_one({8192}, 32, 8, 128, true, true, 0, 0, true);
    time_one({8192}, 32, 8, 128, false, true, 0);
    time_one({8192}, 32, 8, 128, true, false, 0);
    time_one({8192}, 32, 32, 128, true, true, 0);
    for (int d : {64, 80, 96, 192, 256}) time_one({8192}, 32, 8, d, true, true, 0);
    if (brief) return;
    for (int n : {512, 1024, 2048, 4096}) time_one({n}, 32, 8, 128, true, true, 0);
    time_one({131072}, 32, 8, 128, true, true, 0);
    for (int d : {64, 96, 192, 256}) time_one({8192}, 32, 8, d, true, false, 0);
    time_one({32768}, 32, 8, 128, true, true, 4096);
    time_one({8192}, 32, 8, 128, true, true, 0, 50);
    std::vector<int> uneven = {16384};
    for (int i = 0; i < 31; i++) uneven.push_back(100 + i * 53 % 900);
    time_one(uneven, 32, 8, 128, true, true, 0);
    time_one(std::vector<int>(32, 1024), 32, 8, 128, true, true, 0);
}

int main(int count, char** words) {
    const std::string what = count > 1 ? words[1] : "check";
    if (what == "check" || what == "small") check_all(what == "small", count > 2 ? atoi(words[2]) : 0);
    else time_all(what == "brief");
}

// Compares the products of few tokens (crates/kernels/kernels/skinny_gemm.cu) with cuBLAS, and times
// both in graphs of many layers: single products, and all between two attentions of a decoder, which
// one launch of the kernel post_attention can also compute.
// Needs only CUDA, and a GPU of compute capability 9.0.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I crates/cuda/include -I crates/kernels -o skinny_gemm benches/gpu/skinny_gemm.cu -lcublas -lcuda
//     ./skinny_gemm
//
// `small` compares only small shapes, for compute-sanitizer.
#include <cooperative_groups.h>
#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <dependent.cuh>
#include "kernels/half.cuh"
#include "kernels/prefill/wgmma.cuh"

namespace gemm {
#include "kernels/skinny_gemm.cu"
}
#undef KERNEL
#undef KERNELS
#undef CLUSTERS
#undef ALL
#undef BODY
namespace one_launch {
#include "kernels/post_attention.cu"
}
#undef KERNEL
#undef FORMATS
namespace rms_norm {
#include "kernels/rms_norm.cu"
}
namespace silu_mul {
#include "kernels/silu_mul.cu"
}

void ok(int error, int line) {
    if (error == 0) return;
    printf("line %d: error %d\n", line, error);
    exit(1);
}
#define OK(call) ok(int(call), __LINE__)

__global__ void fill(__half* x, size_t n, uint32_t seed, float scale) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t h = uint32_t(i) * 2654435761u + seed;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = __float2half(scale * (float(h & 0xffff) / 32768.f - 1.f));
    }
}
uint64_t make(size_t n, float scale, uint32_t seed) {
    __half* x;
    OK(cudaMalloc(&x, 2 * n + 256));
    fill<<<1024, 256>>>(x, n, seed, scale);
    return uint64_t(x);
}

CUtensorMap map_of(uint64_t address, int rows, int columns, int box) {
    CUtensorMap map;
    const cuuint64_t extents[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {2 * cuuint64_t(columns)};
    const cuuint32_t boxes[2] = {64, cuuint32_t(box)}, ones[2] = {1, 1};
    OK(cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void*)address, extents, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

void launch(const void* kernel, int grid, int threads, int shared, cudaStream_t stream, void** args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization, attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    OK(cudaLaunchKernelExC(&config, kernel, args));
}

struct Product {
    uint64_t w, x, y;
    int outputs, inner;  // Gated: outputs of the activation
    bool gated;
};

// A kernel with clusters of a size; as `Shape` in crates/kernels/src/skinny_gemm.rs.
struct Kernel {
    const void* kernel;
    int cluster, clusters, stages, shared;
};

template <int TOKENS, int CLUSTER>
Kernel make_kernel(const void* kernel) {
    using namespace gemm;
    constexpr int SPARE = 6 << 10, ALIGN = 1024, OWNED = Consumer<__half, TOKENS, CLUSTER, false>::OWNED;
    int most;
    OK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    const int stage = sizeof(Stage<__half, TOKENS>) + 16, fixed = ALIGN + 2 * OWNED * (sizeof(Partial<TOKENS, CLUSTER>) + 8);
    const int stages = (most - SPARE - fixed) / stage, shared = fixed + stages * stage;
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaLaunchConfig_t config{};
    config.gridDim = 1024 * CLUSTER, config.blockDim = THREADS, config.dynamicSmemBytes = shared;
    int clusters;
    OK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return {kernel, CLUSTER, clusters, stages, shared};
}

#define KERNELS_OF(TOKENS) \
    { make_kernel<TOKENS, 3>((const void*)gemm::skinny_gemm_f16_t##TOKENS##_c3), make_kernel<TOKENS, 4>((const void*)gemm::skinny_gemm_f16_t##TOKENS##_c4), \
      make_kernel<TOKENS, 3>((const void*)gemm::skinny_gemm_gated_f16_t##TOKENS##_c3), make_kernel<TOKENS, 4>((const void*)gemm::skinny_gemm_gated_f16_t##TOKENS##_c4) }

void ours(const Product& p, int tokens, cudaStream_t stream, bool prefetch) {
    static const Kernel kernels[3][4] = {KERNELS_OF(8), KERNELS_OF(16), KERNELS_OF(32)};
    const int size = tokens <= 8 ? 0 : tokens <= 16 ? 1 : 2, rows = p.gated ? 2 * p.outputs : p.outputs, tiles = (rows + 127) / 128;
    const Kernel &three = kernels[size][2 * p.gated], &four = kernels[size][2 * p.gated + 1];
    auto time = [&](const Kernel& k) { return double((tiles + k.clusters - 1) / k.clusters) / k.cluster; };
    const Kernel& k = time(three) < time(four) ? three : four;
    gemm::SkinnyGemmArgs a{p.y, tokens, p.outputs, p.inner, k.stages, prefetch ? k.stages : 0, 0};
    CUtensorMap w = map_of(p.w, rows, p.inner, gemm::BOX), x = map_of(p.x, tokens, p.inner, 8 << size);
    void* args[] = {&a, &w, &x};
    const int of_tile = p.gated ? gemm::BOX : 2 * gemm::BOX;
    launch(k.kernel, k.cluster * std::min((p.outputs + of_tile - 1) / of_tile, k.clusters), gemm::THREADS, k.shared, stream, args);
}

cublasHandle_t cublas;
uint64_t wide;  // [tokens, 2 inner]: gate and up
void theirs(const Product& p, int tokens, cudaStream_t stream) {
    const float one = 1, zero = 0;
    const int out = p.gated ? 2 * p.outputs : p.outputs;
    OK(cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, out, tokens, p.inner, &one, (void*)p.w, CUDA_R_16F, p.inner, (void*)p.x, CUDA_R_16F, p.inner, &zero, (void*)(p.gated ? wide : p.y), CUDA_R_16F, out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    if (p.gated) silu_mul::silu_mul_f16<<<(tokens * p.outputs / 8 + 255) / 256, 256, 0, stream>>>({wide, wide + 2 * p.outputs, p.y, out, out, tokens, p.outputs});
}

double median_us(cudaStream_t stream, const std::function<void()>& f) {
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    f();
    OK(cudaStreamEndCapture(stream, &graph)), OK(cudaGraphInstantiate(&replay, graph, 0));
    constexpr int COUNT = 15;
    cudaEvent_t events[COUNT + 1];
    for (auto& e : events) OK(cudaEventCreate(&e));
    for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(replay, stream));
    for (int i = 0; i < COUNT; i++) OK(cudaEventRecord(events[i], stream)), OK(cudaGraphLaunch(replay, stream));
    OK(cudaEventRecord(events[COUNT], stream));
    OK(cudaDeviceSynchronize());
    float times[COUNT];
    for (int i = 0; i < COUNT; i++) OK(cudaEventElapsedTime(&times[i], events[i], events[i + 1]));
    std::sort(times, times + COUNT);
    return 1e3 * times[COUNT / 2];
}

// Numbers of the output after a launch. It is filled with NaN before.
std::vector<float> output(const Product& p, int tokens, const std::function<void()>& f) {
    const size_t n = size_t(tokens) * p.outputs;
    std::vector<__half> y(n);
    OK(cudaMemset((void*)p.y, 0xff, 2 * n));
    OK(cudaDeviceSynchronize());
    f();
    OK(cudaDeviceSynchronize());
    OK(cudaMemcpy(y.data(), (void*)p.y, 2 * n, cudaMemcpyDeviceToHost));
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) x[i] = __half2float(y[i]);
    return x;
}

// Compares a product with cuBLAS's. An activation can double the error of rounded projections.
bool check(const Product& p, int tokens, cudaStream_t stream) {
    const auto y = output(p, tokens, [&] { ours(p, tokens, stream, true); }), again = output(p, tokens, [&] { ours(p, tokens, stream, false); });
    const auto want = output(p, tokens, [&] { theirs(p, tokens, stream); });
    double worst = 0, norm = 0;
    for (float x : want) norm += double(x) * x;
    norm = sqrt(norm / want.size());
    for (size_t i = 0; i < y.size(); i++) {
        const double off = fabs(y[i] - want[i]) / norm;
        if (!(off <= worst)) worst = off;
    }
    const bool good = worst < (p.gated ? 2e-2 : 5e-3) && y == again;
    if (!good) printf("WRONG: %d x %d%s, %d tokens: off by %.1e of the norm\n", p.outputs, p.inner, p.gated ? " gated" : "", tokens, worst);
    return good;
}

uint64_t weights(int outputs, int inner, int seed) { return make(size_t(outputs) * inner, 2.f / sqrtf(inner), seed); }

constexpr int MOST = 32;

bool check_all(cudaStream_t stream, bool small) {
    bool good = true;
    int count = 0;
    const uint64_t x = make(14336 * MOST, 1, 1), y = make(49152 * MOST, 1, 2);
    for (auto [outputs, inner] : {std::pair{24, 8}, std::pair{20000, 72}, std::pair{49152, 576}, std::pair{1008, 72}, std::pair{576, 576}, std::pair{1536, 576}, std::pair{960, 1536}, std::pair{4096, 14336}, std::pair{14336, 4096}, std::pair{6144, 4096}}) {
        if (small && (inner > 2000 || outputs > 20000)) continue;
        for (bool gated : {false, true}) {
            const Product p{weights((gated + 1) * outputs, inner, 77), x, y, outputs, inner, gated};
            for (int tokens : {1, 5, 8, 9, 16, 17, 31, 32}) good &= check(p, tokens, stream), count++;
            OK(cudaFree((void*)p.w));
        }
    }
    printf("%d products compared\n", count);
    return good;
}

struct Layer { Product output, gate_up, down, next; };
uint64_t residual, sum, normed, norm_weight;

void between(const Layer& l, int tokens, cudaStream_t stream, bool own) {
    auto product = [&](const Product& p, bool prefetch) { own ? ours(p, tokens, stream, prefetch) : theirs(p, tokens, stream); };
    auto norm = [&](const Product& from) {
        rms_norm::RmsNormArgs a{residual, from.y, norm_weight, sum, normed, from.outputs, 1e-5f};
        void* args[] = {&a};
        if (own) launch((const void*)rms_norm::rms_norm_f16, tokens, rms_norm::THREADS, 0, stream, args);
        else rms_norm::rms_norm_f16<<<tokens, rms_norm::THREADS, 0, stream>>>(a);
    };
    product(l.output, false), norm(l.output), product(l.gate_up, true), product(l.down, true), norm(l.down), product(l.next, true);
}

// All between two attentions in one launch, for one or two tokens.
void together(const Layer& l, int tokens, cudaStream_t stream) {
    const int hidden = l.output.outputs, inner = l.down.inner;
    one_launch::PostAttentionArgs a{l.output.x, residual, l.output.w, norm_weight, l.gate_up.w, l.down.w, norm_weight, l.next.w, sum, l.gate_up.y, normed, l.next.y, hidden, hidden, inner, l.next.outputs, tokens, 6, 1e-5f, 0};
    int blocks, most;
    OK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0)), OK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    auto shared = [&] { return one_launch::WARPS * a.stages * int(sizeof(one_launch::Chunk) + 8) + 2 * tokens * std::max(hidden, inner); };
    while (shared() + 128 > most) a.stages--;
    const void* kernel = tokens == 1 ? (const void*)one_launch::post_attention_f16_r1 : (const void*)one_launch::post_attention_f16_r2;
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared()));
    void* args[] = {&a};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks, config.blockDim = one_launch::THREADS, config.dynamicSmemBytes = shared(), config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization, attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeCooperative, attributes[1].val.cooperative = 1;
    config.attrs = attributes, config.numAttrs = 2;
    OK(cudaLaunchKernelExC(&config, kernel, args));
}

struct Shape { const char* name; int hidden, inner, next, layers; };

void time(const Shape& s, cudaStream_t stream) {
    const uint64_t attention = make(s.hidden * MOST, 1, 6), gated = make(s.inner * MOST, 1, 7), y = make(s.hidden * MOST, 1, 8), q = make(s.next * MOST, 1, 9);
    wide = make(2 * s.inner * MOST, 1, 1), residual = make(s.hidden * MOST, 1, 2), sum = make(s.hidden * MOST, 1, 3), normed = make(s.hidden * MOST, 1, 4), norm_weight = make(s.hidden, 1, 5);
    std::vector<Layer> layers;
    for (int i = 0; i < s.layers; i++)
        layers.push_back({{weights(s.hidden, s.hidden, 10 * i), attention, y, s.hidden, s.hidden, false},
                          {weights(2 * s.inner, s.hidden, 10 * i + 1), normed, gated, s.inner, s.hidden, true},
                          {weights(s.hidden, s.inner, 10 * i + 2), gated, y, s.hidden, s.inner, false},
                          {weights(s.next, s.hidden, 10 * i + 3), normed, q, s.next, s.hidden, false}});
    auto row = [&](const char* what, int tokens, double bytes, double their_us, double our_us) {
        printf("| %s | %s | %d | %.1f | %.0f | %.1f | %.0f |\n", s.name, what, tokens, their_us / s.layers, 1e-3 * bytes * s.layers / their_us, our_us / s.layers, 1e-3 * bytes * s.layers / our_us);
    };
    for (int tokens : {1, 2, 4, 8, 16, 32}) {
        for (auto [name, member] : {std::pair{"output", &Layer::output}, std::pair{"gate and up", &Layer::gate_up}, std::pair{"down", &Layer::down}, std::pair{"next", &Layer::next}}) {
            if (tokens != 1 && tokens != 16) continue;
            const Product& p = layers[0].*member;
            row(name, tokens, 2. * p.outputs * p.inner * (p.gated ? 2 : 1), median_us(stream, [&, member = member] { for (auto& l : layers) theirs(l.*member, tokens, stream); }),
                median_us(stream, [&, member = member] { for (auto& l : layers) ours(l.*member, tokens, stream, true); }));
        }
        row("all between attentions", tokens, 2. * s.hidden * (s.hidden + 3. * s.inner + s.next), median_us(stream, [&] { for (auto& l : layers) between(l, tokens, stream, false); }),
            median_us(stream, [&] { for (auto& l : layers) between(l, tokens, stream, true); }));
        if (tokens <= 2) printf("| %s | all, in one launch | %d | | | %.1f | |\n", s.name, tokens, median_us(stream, [&] { for (auto& l : layers) together(l, tokens, stream); }) / s.layers);
    }
    for (auto& l : layers)
        for (const Product& p : {l.output, l.gate_up, l.down, l.next}) OK(cudaFree((void*)p.w));
}

int main(int count, char** words) {
    const bool small = count > 1 && !strcmp(words[1], "small");
    cudaStream_t stream;
    OK(cudaStreamCreate(&stream));
    OK(cublasCreate(&cublas)), OK(cublasSetStream(cublas, stream));
    void* workspace;
    OK(cudaMalloc(&workspace, 32 << 20)), OK(cublasSetWorkspace(cublas, workspace, 32 << 20));
    wide = make(2 * 49152 * MOST, 1, 1);
    const bool good = check_all(stream, small);
    if (!small) {
        puts("| shape | products | rows | cuBLAS, us | GB/s | ours, us | GB/s |\n|---|---|---:|---:|---:|---:|---:|");
        for (const Shape& s : {Shape{"Llama-3-8B", 4096, 14336, 6144, 16}, Shape{"Llama-3-8B's last layer and head", 4096, 14336, 128256, 3}, Shape{"Llama-3-70B", 8192, 28672, 10240, 6}, Shape{"Llama-3.2-3B", 3072, 8192, 5120, 16}, Shape{"Llama-3.2-1B", 2048, 8192, 3072, 16}, Shape{"SmolLM2-360M", 960, 2560, 1600, 32}, Shape{"SmolLM2-135M", 576, 1536, 960, 30}}) time(s, stream);
    }
    puts(good ? "all good" : "FAILED");
    return !good;
}

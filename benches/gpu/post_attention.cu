// Compares the kernel post_attention with separate kernels for each of its steps, bit for bit, and
// times both in graphs of many layers. Needs only CUDA, and a GPU of compute capability 9.0.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I crates/kernels -o post_attention benches/gpu/post_attention.cu
//     ./post_attention
//
// `small` leaves large shapes out, for compute-sanitizer.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/half.cuh"

namespace fused {
#include "kernels/post_attention.cu"
}
#undef KERNEL
#undef FORMATS
namespace matvec {
#include "kernels/matvec.cu"
}
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
#define OK(call) ok(call, __LINE__)

__global__ void fill(__half* x, size_t n, uint32_t seed, float scale) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t h = uint32_t(i) * 2654435761u + seed;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = __float2half(scale * (float(h & 0xffff) / 32768.f - 1.f));
    }
}

// An array of random numbers.
uint64_t make(size_t n, float scale, uint32_t seed) {
    __half* x;
    OK(cudaMalloc(&x, 2 * n + 256));
    fill<<<1024, 256>>>(x, n, seed, scale);
    return uint64_t(x);
}

struct Shape { const char* name; int attention, hidden, inner, next, layers; };

// Launches a layer of separate kernels. `x` and `y`: workspaces.
void separate(cudaStream_t stream, const fused::PostAttentionArgs& a, uint64_t x, uint64_t y) {
    auto product = [&](uint64_t from, uint64_t w, int inner, int out, uint64_t to) {
        const matvec::MatVecArgs args{w, from, to, inner, out, a.rows, 0};
        const bool two = out < 8192;
        const auto kernel = a.rows == 1 ? (two ? matvec::matvec_f16_r1_o2 : matvec::matvec_f16_r1_o4) : a.rows == 2 ? (two ? matvec::matvec_f16_r2_o2 : matvec::matvec_f16_r2_o4) : (two ? matvec::matvec_f16_r4_o2 : matvec::matvec_f16_r4_o4);
        const int per = matvec::WARPS * (two ? 2 : 4);
        kernel<<<(out + per - 1) / per, matvec::THREADS, 0, stream>>>(args);
    };
    auto norm = [&](uint64_t residual, uint64_t sum, uint64_t weight) {
        rms_norm::rms_norm_f16<<<a.rows, rms_norm::THREADS, 0, stream>>>({residual, y, weight, sum, x, a.hidden, a.eps});
    };
    product(a.attention, a.output, a.attention_size, a.hidden, y);
    norm(a.residual, a.middle, a.norm);
    product(x, a.gate_up, a.hidden, 2 * a.inner, y);
    silu_mul::silu_mul_f16<<<(a.rows * a.inner / 8 + 255) / 256, 256, 0, stream>>>({y, y + 2 * a.inner, a.gated, 2 * a.inner, 2 * a.inner, a.rows, a.inner});
    product(a.gated, a.down, a.inner, a.hidden, y);
    norm(a.middle, a.sum, a.next_norm);
    product(x, a.next, a.hidden, a.next_size, a.y);
}

// Bytes of shared memory with `stages` chunks in each warp's ring.
int shared_bytes(const fused::PostAttentionArgs& a) {
    return fused::WARPS * a.stages * int(sizeof(fused::Chunk) + 8) + 2 * a.rows * std::max({a.attention_size, a.hidden, a.inner});
}

void together(cudaStream_t stream, const fused::PostAttentionArgs& a, int blocks) {
    const void* kernel = a.rows == 1 ? (const void*)fused::post_attention_f16_r1 : a.rows == 2 ? (const void*)fused::post_attention_f16_r2 : (const void*)fused::post_attention_f16_r4;
    const int shared = shared_bytes(a);
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    void* args[] = {(void*)&a};
    OK(cudaLaunchCooperativeKernel(kernel, blocks, fused::THREADS, args, shared, stream));
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

// Whether both give the same bits.
bool equal(const fused::PostAttentionArgs& a, const std::function<void()>& ours, const std::function<void()>& theirs) {
    std::vector<char> results[2];
    const size_t sum = 2 * size_t(a.rows) * a.hidden, y = 2 * size_t(a.rows) * a.next_size;
    for (int i = 0; i < 2; i++) {
        OK(cudaMemset((void*)a.sum, 0xff, sum)), OK(cudaMemset((void*)a.y, 0xff, y));
        OK(cudaDeviceSynchronize());
        (i ? theirs : ours)();
        OK(cudaDeviceSynchronize());
        results[i].resize(sum + y);
        OK(cudaMemcpy(results[i].data(), (void*)a.sum, sum, cudaMemcpyDeviceToHost)), OK(cudaMemcpy(results[i].data() + sum, (void*)a.y, y, cudaMemcpyDeviceToHost));
    }
    size_t differ = 0;
    const __half *mine = (const __half*)results[0].data(), *other = (const __half*)results[1].data();
    for (size_t i = 0; i < results[0].size() / 2; i++) differ += memcmp(mine + i, other + i, 2) != 0 || __half2float(mine[i]) != __half2float(mine[i]);
    if (differ) printf("  %zu of %zu numbers differ, the first %g, not %g\n", differ, results[0].size() / 2, __half2float(mine[0]), __half2float(other[0]));
    return !differ;
}

int main(int count, char** words) {
    const bool small = count > 1 && !strcmp(words[1], "small");
    cudaStream_t stream;
    OK(cudaStreamCreate(&stream));
    int blocks, most;
    OK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0)), OK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    const size_t large = size_t(4) << 30;
    char *from, *to;
    OK(cudaMalloc(&from, large)), OK(cudaMalloc(&to, large));
    const double copied = median_us(stream, [&] { OK(cudaMemcpyAsync(to, from, large, cudaMemcpyDeviceToDevice, stream)); });
    printf("copy: %.0f GB/s read and written\n", 2e-3 * large / copied);
    OK(cudaFree(from)), OK(cudaFree(to));
    bool good = true;
    for (Shape s : {Shape{"Llama-3-8B", 4096, 4096, 14336, 6144, 16}, {"head", 4096, 4096, 14336, 128256, 2}, {"SmolLM2-135M", 576, 576, 1536, 960, 30}, {"long rows", 8192, 8192, 28672, 10240, 2}, {"odd", 72, 1096, 3016, 1003, 3}}) {
        if (small && s.hidden >= 4096) continue;
        std::vector<fused::PostAttentionArgs> layers;
        const uint64_t x = make(4 * s.inner, 1, 1), y = make(8 * std::max(s.inner, s.next), 1, 2);
        for (int i = 0; i < s.layers; i++) {
            auto weights = [&](int out, int inner, int seed) { return make(size_t(out) * inner, 2.f / sqrtf(inner), 100 * i + seed); };
            layers.push_back({make(4 * s.attention, 1, 3), make(4 * s.hidden, 1, 4), weights(s.hidden, s.attention, 5), make(s.hidden, 1, 9), weights(2 * s.inner, s.hidden, 6), weights(s.hidden, s.inner, 7),
                              make(s.hidden, 1, 10), weights(s.next, s.hidden, 8), make(4 * s.hidden, 1, 11), make(4 * s.inner, 1, 12), make(4 * s.hidden, 1, 13), make(4 * size_t(s.next), 1, 14),
                              s.attention, s.hidden, s.inner, s.next, 1, 0, 1e-5f});
        }
        for (int rows : {1, 2, 3, 4}) {
            for (auto& a : layers) a.rows = rows;
            int stages = 6;
            for (layers[0].stages = stages; shared_bytes(layers[0]) + 256 > most; layers[0].stages = --stages) {}
            if (stages < 2) {
                printf("%s, %d rows: too little shared memory\n", s.name, rows);
                continue;
            }
            for (auto& a : layers) a.stages = stages;
            const double bytes = 2. * s.hidden * s.attention + 6. * s.inner * s.hidden + 2. * s.next * s.hidden;
            const double theirs = median_us(stream, [&] { for (auto& a : layers) separate(stream, a, x, y); }) / s.layers;
            const double ours = median_us(stream, [&] { for (auto& a : layers) together(stream, a, blocks); }) / s.layers;
            printf("%s, %d rows: separate %.2f us, %.0f GB/s | one launch %.2f us, %.0f GB/s (%d stages)\n", s.name, rows, theirs, 1e-3 * bytes / theirs, ours, 1e-3 * bytes / ours, stages);
            good &= equal(layers[0], [&] { together(stream, layers[0], blocks); }, [&] { separate(stream, layers[0], x, y); });
        }
        for (auto& a : layers) {
            for (uint64_t p : {a.attention, a.residual, a.output, a.gate_up, a.down, a.next, a.norm, a.next_norm, a.middle, a.gated, a.sum, a.y}) OK(cudaFree((void*)p));
        }
    }
    puts(good ? "all equal" : "FAILED");
    return !good;
}

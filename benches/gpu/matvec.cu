// Compares the product of a matrix with a few rows with cuBLAS with f32 sums, and times both. Needs
// only CUDA.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I crates/kernels -lcublas -o matvec benches/gpu/matvec.cu
//     ./matvec
//
// Shapes are those of a layer of Llama-3-8B and of its output head. Calls alternate between
// matrices, so none is in the L2 cache.
#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "kernels/matvec.cu"

void ok(int error, int line) {
    if (error == 0) return;
    printf("line %d: error %d\n", line, error);
    exit(1);
}
#define OK(call) ok(call, __LINE__)

__global__ void fill(__half* x, size_t n, uint32_t seed) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t h = uint32_t(i) * 2654435761u + seed;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = __float2half(float(h & 0xffff) / 32768.f - 1.f);
    }
}

double median_ms(const std::function<void(int)>& f) {
    constexpr int COUNT = 40;
    std::vector<cudaEvent_t> events(COUNT + 1);
    for (auto& e : events) OK(cudaEventCreate(&e));
    for (int i = 0; i < 5; i++) f(i);
    for (int i = 0; i < COUNT; i++) OK(cudaEventRecord(events[i])), f(i);
    OK(cudaEventRecord(events[COUNT]));
    OK(cudaDeviceSynchronize());
    std::vector<float> times(COUNT);
    for (int i = 0; i < COUNT; i++) OK(cudaEventElapsedTime(&times[i], events[i], events[i + 1]));
    std::sort(times.begin(), times.end());
    return times[COUNT / 2];
}

int main() {
    constexpr int MOST = 4;
    struct Shape { const char* name; int out, inner; };
    cublasHandle_t cublas;
    OK(cublasCreate(&cublas));
    bool good = true;
    for (Shape s : {Shape{"queries, keys, values", 6144, 4096}, {"output", 4096, 4096}, {"gate and up", 28672, 4096}, {"down", 4096, 14336}, {"head", 128256, 4096}, {"odd", 1003, 1096}}) {
        const size_t size = size_t(s.out) * s.inner, copies = (300u << 20) / (2 * size) + 1;
        __half *w, *x, *y, *want;
        OK(cudaMalloc(&w, 2 * size * copies)), OK(cudaMalloc(&x, 2 * MOST * s.inner));
        OK(cudaMalloc(&y, 2 * MOST * s.out)), OK(cudaMalloc(&want, 2 * MOST * s.out));
        fill<<<1024, 256>>>(w, size * copies, 1), fill<<<1024, 256>>>(x, size_t(MOST) * s.inner, 2);
        for (int rows : {1, 2, 3, 4}) for (int outputs : {2, 4}) {
            auto ours = [&](int i) {
                const MatVecArgs a{uint64_t(w + i % copies * size), uint64_t(x), uint64_t(y), s.inner, s.out, rows, 0};
                const bool two = outputs == 2;
                const auto kernel = rows == 1 ? (two ? matvec_f16_r1_o2 : matvec_f16_r1_o4) : rows == 2 ? (two ? matvec_f16_r2_o2 : matvec_f16_r2_o4) : (two ? matvec_f16_r4_o2 : matvec_f16_r4_o4);
                kernel<<<(s.out + WARPS * outputs - 1) / (WARPS * outputs), THREADS>>>(a);
            };
            auto theirs = [&](int i) {
                const float one = 1.f, zero = 0.f;
                OK(cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, s.out, rows, s.inner, &one, w + i % copies * size, CUDA_R_16F, s.inner, x, CUDA_R_16F, s.inner, &zero, want,
                                CUDA_R_16F, s.out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
            };
            OK(cudaMemset(y, 0xff, 2 * MOST * s.out));
            ours(0), theirs(0);
            std::vector<__half> a(size_t(rows) * s.out), b(a.size());
            OK(cudaMemcpy(a.data(), y, 2 * a.size(), cudaMemcpyDeviceToHost)), OK(cudaMemcpy(b.data(), want, 2 * b.size(), cudaMemcpyDeviceToHost));
            double error = 0, norm = 0;
            for (size_t i = 0; i < a.size(); i++) error += pow(__half2float(a[i]) - __half2float(b[i]), 2), norm += pow(__half2float(b[i]), 2);
            error = sqrt(error / norm);
            if (!(error < 1e-3)) good = false;
            const double mine = median_ms(ours), cublas_ms = median_ms(theirs), gbs = 2e-6 * size;
            printf("%-22s %d rows, %d outputs a warp: off by %.1e | ours %.4f ms, %4.0f GB/s | cuBLAS %.4f ms, %4.0f GB/s\n", s.name, rows, outputs, error, mine, gbs / mine, cublas_ms, gbs / cublas_ms);
        }
        OK(cudaFree(w)), OK(cudaFree(x)), OK(cudaFree(y)), OK(cudaFree(want));
    }
    puts(good ? "all equal" : "FAILED");
    return !good;
}

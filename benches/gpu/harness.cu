// Compares the kernels of kv-quant with plain ones, and times them. Needs only CUDA.
//
//     compile="nvcc -O3 -std=c++17 -arch=sm_90 -I crates/cuda/include -I crates/kv-quant/kernels benches/gpu/harness.cu"
//     $compile -DHEAD_DIM=128 -o check && ./check check
//     $compile -DTIMES -o times && ./times time
//     $compile -DHEAD_DIM=128 -DPACKING -o packing && ./packing check && ./packing time ordered
//
// With PACKING, packing alone is checked and timed. With -DONLY_KEYS=4 -DONLY_VALUES=2, only
// these bits are compiled.
//
// `small` instead of `check` runs only short lengths, for compute-sanitizer. Records are in random
// order; with `time ordered` they are consecutive.
//
// The reference reads the numbers before packing, quantizes each group separately with plain
// divisions, and computes softmax attention in f64. It shares neither layout nor arithmetic with
// the kernels.
#include "packed.cuh"

#include "quantize.cuh"

__device__ float as_f16(float x) { return __half2float(__float2half_rn(x)); }

// Quantizes one group of `n` numbers, `step` apart, to `bits` bits and dequantizes it.
__device__ void group_of(const void* x, float* y, i64 at, i64 step, int n, int bits, int kind) {
    float low = INFINITY, high = -INFINITY;
    for (int i = 0; i < n; i++) {
        float v = as_f16(number(x, at + i * step, kind));
        low = fminf(low, v), high = fmaxf(high, v);
    }
    float largest = (1 << bits) - 1, scale = as_f16(__fdiv_rn(as_f16(high - low), largest));
    for (int i = 0; i < n; i++) {
        float v = as_f16(number(x, at + i * step, kind));
        float code = scale > 0.f ? fminf(rintf(as_f16(__fdiv_rn(as_f16(v - low), scale))), largest) : 0.f;
        y[at + i * step] = fmaf(code, scale, low);
    }
}

// Quantizes and dequantizes the first `packed_k` keys, to `key_bits` bits, and `packed_v` values, to
// `value_bits`, of each row; copies the rest.
__global__ void plain_quantize(const void* k, const void* v, float* yk, float* yv, int rows, int tokens, int packed_k, int packed_v, int d,
                               int key_bits, int value_bits, int group, int kind) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    i64 groups = packed_k / group;
    if (i < rows * groups * d) group_of(k, yk, (i / d / groups * tokens + i / d % groups * group) * d + i % d, d, group, key_bits, kind);
    int vgroup = group < d ? group : d, vgroups = d / vgroup;
    i64 n = (i64)rows * packed_v * vgroups;
    if (i < n) group_of(v, yv, (i / vgroups / packed_v * tokens + i / vgroups % packed_v) * d + i % vgroups * vgroup, 1, vgroup, value_bits, kind);
    i64 token = i / d % tokens;
    if (i < (i64)rows * tokens * d) {
        if (token >= packed_k) yk[i] = number(k, i, kind);
        if (token >= packed_v) yv[i] = number(v, i, kind);
    }
}

template <int K, int V, int G, int D>
__global__ void __launch_bounds__(128) quantize_kernel(const FillArgs args) {
    Quantize<K, V, G, D>::run(args);
}

template <int K, int V, int G, int D>
Config kivi(std::vector<Variant> attend) {
    using Q = Quantize<K, V, G, D>;
    Config c = config<Kivi<K, V, G, D>>(std::to_string(K) + "/" + std::to_string(V) + " bits", attend);
    c.quantize = quantize_kernel<K, V, G, D>, c.quantize_threads = 128, c.quantize_shared = Q::SHARED, c.k_parts = Q::K_PARTS;
    c.plain = [](const void* k, const void* v, float* yk, float* yv, int rows, int tokens, int packed_k, int packed_v, int kind) {
        plain_quantize<<<blocks((i64)rows * tokens * D), 256>>>(k, v, yk, yv, rows, tokens, packed_k, packed_v, D, K, V, G, kind);
    };
    return c;
}

#ifndef WIDE
#define WIDE 1
#endif

template <int K, int V, int G, int D>
Config checked() {
    [[maybe_unused]] constexpr int S = K == 8 || D == 256 ? 3 : 4;
#ifdef PACKING
    return kivi<K, V, G, D>({});
#elif WIDE
    return kivi<K, V, G, D>({variant<Kivi<K, V, G, D>, 1, 4, S>(), variant<Kivi<K, V, G, D>, 2, 4, S>()});
#else
    return kivi<K, V, G, D>({variant<Kivi<K, V, G, D>, 1, 4, S>()});
#endif
}

template <int K, int V, int D>
void groups(std::vector<Config>& all) {
    all.push_back(checked<K, V, 32, D>()), all.push_back(checked<K, V, 64, D>()), all.push_back(checked<K, V, 128, D>());
}

std::vector<Config> everything() {
    std::vector<Config> all;
#if defined(HEAD_DIM) && defined(ONLY_KEYS)
    groups<ONLY_KEYS, ONLY_VALUES, HEAD_DIM>(all);
#elif defined(HEAD_DIM)
    groups<4, 4, HEAD_DIM>(all), groups<3, 3, HEAD_DIM>(all), groups<2, 2, HEAD_DIM>(all), groups<8, 8, HEAD_DIM>(all);
    groups<4, 2, HEAD_DIM>(all), groups<2, 4, HEAD_DIM>(all);
#endif
    return all;
}

#ifdef TIMES
// With the warps and stages of src/cuda/layout.rs.
template <int K, int V>
Config timed() {
    return kivi<K, V, 32, 128>({variant<Kivi<K, V, 32, 128>, 1, 4, 3>()});
}

std::vector<Config> timed_formats() {
#ifdef ONLY_KEYS
    return {timed<ONLY_KEYS, ONLY_VALUES>()};
#else
    return {timed<4, 4>(), timed<2, 2>(), timed<8, 8>(), timed<4, 2>(), timed<2, 4>()};
#endif
}
#endif

int main(int count, char** words) {
    std::string what = count > 1 ? words[1] : "check";
    OK(cudaSetDevice(0));
    if (what == "check" || what == "small") {
#ifdef PACKING
        check_packing(everything(), what == "small");
#else
        check_all(everything(), what == "small", true);
#endif
    }
#ifdef PACKING
    if (what == "time") {
        disorder = count < 3 || strcmp(words[2], "ordered");
        copy_gbs = copy_bandwidth();
        printf("copy: %.0f GB/s\n", copy_gbs);
        for (auto& c : everything())
            for (int kind : {0, 1}) time_quantize(c, 8, 131072, kind);
    }
#endif
#ifdef TIMES
    if (what == "time") {
        disorder = count < 3 || strcmp(words[2], "ordered");
        copy_gbs = copy_bandwidth();
        printf("copy: %.0f GB/s; an empty kernel: %.4f ms\n", copy_gbs, median_ms(60, [](int) { empty<<<264, 256>>>(); }));
        auto all = timed_formats();
        for (auto& c : all)
            for (int kind : {0, 1}) time_quantize(c, 8, 131072, kind);
        for (int batch : {1, 8})
            for (int t : {131072, 32768, 4096})
                for (auto [kv, per] : {std::pair{32, 1}, {8, 4}})
                    for (auto& c : all) time_attend(c, c.attend[0], batch, kv, per, t);
        for (auto [batch, t] : BATCHES)
            for (auto& c : all) time_attend(c, c.attend[0], batch, 8, 4, t);
    }
#endif
    OK(cudaDeviceSynchronize());
    return 0;
}

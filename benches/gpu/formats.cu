// Compares the kernels of kv-quant's formats with a scale per token (fp8, rotated integers,
// TurboQuant) and of KVarN with plain ones, and times them.
//
//     compile="nvcc -O3 -std=c++17 -arch=sm_90 -I crates/cuda/include -I crates/kv-quant/kernels benches/gpu/formats.cu"
//     $compile -DHEAD_DIM=128 -o check && ./check check
//     $compile -DTIMES -o times && ./times time ordered
//     $compile -DHEAD_DIM=128 -DPACKING -o packing && ./packing check && ./packing time ordered
//
// With PACKING, packing alone is checked and timed.
//
// The reference rotates by the definition of the matrix, quantizes each token or tile separately in
// f64, rotates back, and computes softmax attention in f64.
#include "packed.cuh"

#include "balance.cuh"
#include "formats.cuh"

// ---- The reference ----

// The quantization of keys or of values.
struct PlainScheme {
    Codes codes;
    Params params;
    int bits;
    bool rotated, f16_steps;
    double fixed;  // a scale for all
};

__global__ void plain_widen(const void* x, double* y, i64 n, int kind) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) y[i] = number(x, i, kind);
}

// One block of D threads per row.
__global__ void plain_rotate(double* x, int d) {
    extern __shared__ double row[];
    double* own = x + (i64)blockIdx.x * d;
    row[threadIdx.x] = own[threadIdx.x];
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < d; i++) sum += __popc(i & threadIdx.x) % 2 ? -row[i] : row[i];
    own[threadIdx.x] = sum / sqrt((double)d);
}

__device__ double half_of(double x) { return __half2float(__float2half_rn((float)x)); }

// The nearest 8-bit floating-point number with `mantissa` bits of mantissa, ties to even.
__device__ double plain_float8(double x, int mantissa, int least, double largest) {
    double y = fmin(fabs(x), largest);
    if (y == 0) return 0;
    int exponent;
    frexp(y, &exponent);  // y = 0.5 to 1 times 2^exponent
    double unit = ldexp(1., max(exponent - 1, least) - mantissa);
    return copysign(rint(y / unit) * unit, x);
}

// One thread per token.
__global__ void plain_tokens(double* x, int rows, int tokens, int packed, int d, PlainScheme s) {
    const double four[8] = {0.12842765, 0.3881378, 0.6568799, 0.94244826, 1.2562575, 1.6178818, 2.068447, 2.7309222}, three[4] = {0.2449836, 0.7556455, 1.3431801, 2.1503496};
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (i >= (i64)rows * packed) return;
    double *y = x + (i / packed * tokens + i % packed) * d, low = INFINITY, high = -INFINITY, far = 0, squares = 0;
    if (s.f16_steps)
        for (int c = 0; c < d; c++) y[c] = half_of(y[c]);
    for (int c = 0; c < d; c++) low = fmin(low, y[c]), high = fmax(high, y[c]), far = fabs(y[c]) > fabs(far) ? y[c] : far, squares += y[c] * y[c];
    int largest = (1 << s.bits) - 1, half = 1 << (s.bits - 1);
    if (s.codes == Codes::INTEGERS) {
        double scale = s.f16_steps ? half_of(half_of(high - low) / largest) : (high - low) / largest;
        for (int c = 0; c < d; c++) {
            double step = s.f16_steps ? rint(half_of(half_of(y[c] - low) / scale)) : floor((y[c] - low) / scale + 0.5);
            y[c] = fmin(step, (double)largest) * half_of(scale) + half_of(low);
        }
    } else if (s.codes == Codes::SIGNED) {
        double scale = far / -half;
        for (int c = 0; c < d; c++) y[c] = (fmin(floor(y[c] / scale + half + 0.5), (double)largest) - half) * half_of(scale);
    } else if (s.codes == Codes::LEVELS) {
        const double* levels = s.bits == 4 ? four : three;
        double norm = sqrt(squares), held = 0;
        for (int c = 0; c < d; c++) {
            double z = fabs(y[c]) / norm * sqrt((double)d), best = levels[0];
            for (int j = 1; j < half; j++) best = fabs(z - levels[j]) < fabs(z - best) ? levels[j] : best;
            y[c] = copysign(best, y[c]), held += best * best;
        }
        for (int c = 0; c < d; c++) y[c] *= half_of(norm / sqrt(held));
    } else {
        bool e4 = s.codes == Codes::E4M3;
        double top = e4 ? 448 : 57344, scale = s.params == Params::NONE ? s.fixed : half_of(fabs(far) / top);
        for (int c = 0; c < d; c++) y[c] = plain_float8(y[c] / scale, e4 ? 3 : 2, e4 ? -6 : -14, top) * scale;
    }
}

// KVarN's quantizer: one block per tile of t tokens; thread i processes row i or column i.
__global__ void plain_balance(double* x, int tokens, int packed, int d, int t, int bits, bool values) {
    __shared__ double logs[2][256], deviations[2][256], best[2][256], scales[256];
    const int i = threadIdx.x, tiles = packed / t, count[2] = {t, d};
    double* y = x + ((i64)(blockIdx.x / tiles) * tokens + blockIdx.x % tiles * t) * d;
    auto at = [&](int side, int i, int j) -> double& { return side ? y[j * d + i] : y[i * d + j]; };
    auto measure = [&](int side) {
        __syncthreads();
        if (i < count[side]) {
            double sum = 0, squares = 0;
            int n = count[!side];
            auto of = [&](int j) { return at(side, i, j) / exp(logs[side][i] + logs[!side][j]); };
            for (int j = 0; j < n; j++) sum += of(j);
            for (int j = 0; j < n; j++) squares += (of(j) - sum / n) * (of(j) - sum / n);
            deviations[side][i] = sqrt(squares / (n - 1));
        }
        __syncthreads();
    };
    auto update = [&](int side) { logs[side][i] = fmin(fmax(logs[side][i] + log(fmin(fmax(deviations[side][i], 1e-3), 1e3)), -0.3), 10.); };
    logs[0][i] = logs[1][i] = 0, deviations[0][i] = deviations[1][i] = 1;
    double least = INFINITY;
    for (int round = 0; round <= 8; round++) {
        if (round) update(values), measure(!values), update(!values);
        measure(0), measure(1);
        double spread = 0;
        for (int side = 0; side < 2; side++) {
            double low = INFINITY, high = 0;
            for (int j = 0; j < count[side]; j++) low = fmin(low, deviations[side][j]), high = fmax(high, deviations[side][j]);
            spread += high / fmax(low, 1e-8);
        }
        if (spread <= least) least = spread, best[0][i] = exp(logs[0][i]), best[1][i] = exp(logs[1][i]);
        __syncthreads();
    }
    int side = !values, largest = (1 << bits) - 1;
    if (i < count[side]) {
        double low = INFINITY, high = -INFINITY;
        for (int j = 0; j < count[!side]; j++) {
            double z = at(side, i, j) / best[side][i] / best[!side][j];
            low = fmin(low, z), high = fmax(high, z);
        }
        scales[i] = (high - low) / largest;
        for (int j = 0; j < count[!side]; j++) {
            double z = at(side, i, j) / best[side][i] / best[!side][j];
            at(side, i, j) = (fmin(rint((z - low) / scales[i]), (double)largest) * half_of(scales[i] * best[side][i]) + half_of(low * best[side][i])) * half_of(best[!side][j]);
        }
    }
}

__global__ void plain_narrow(const double* x, const void* raw, float* y, int rows, int tokens, int packed, int d, int kind) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (i64)rows * tokens * d; i += (i64)gridDim.x * blockDim.x)
        y[i] = i / d % tokens < packed ? x[i] : number(raw, i, kind);
}

void plain_side(const void* x, float* y, int rows, int tokens, int packed, int d, int group, PlainScheme s, bool values, int kind) {
    static Buffer<double> wide;
    i64 n = (i64)rows * tokens * d;
    plain_widen<<<1024, 256>>>(x, wide.take(n), n, kind);
    if (s.rotated) plain_rotate<<<rows * tokens, d, d * 8>>>(wide.p, d);
    if (packed && s.params == Params::BALANCED) plain_balance<<<rows * (packed / group), 256>>>(wide.p, tokens, packed, d, group, s.bits, values);
    else if (packed) plain_tokens<<<blocks((i64)rows * packed), 256>>>(wide.p, rows, tokens, packed, d, s);
    if (s.rotated) plain_rotate<<<rows * tokens, d, d * 8>>>(wide.p, d);
    plain_narrow<<<1024, 256>>>(wide.p, x, y, rows, tokens, packed, d, kind);
    OK(cudaGetLastError());
}

// ---- Checks ----

template <class L>
__global__ void __launch_bounds__(TOKEN_THREADS, token_blocks<L>()) tokens_kernel(const FillArgs args) {
    quantize_tokens<L>(args);
}

template <class L>
__global__ void __launch_bounds__(balance_threads<L>()) balance_kernel(const FillArgs args) {
    quantize_balanced<L>(args);
}

template <class L>
Config format(std::string name, std::vector<Variant> attend, int rotated = 0, bool f16_steps = false) {
    using K = typename L::Keys;
    using V = typename L::Values;
    Config c = config<L>(name, attend);
    constexpr bool BALANCED = K::PARAMS == Params::BALANCED;
    if constexpr (BALANCED) {
        c.quantize = balance_kernel<L>, c.quantize_threads = balance_threads<L>(), c.quantize_shared = balance_shared<L>(), c.k_parts = 1;
        OK(cudaFuncSetAttribute(c.quantize, cudaFuncAttributeMaxDynamicSharedMemorySize, c.quantize_shared));
    } else {
        c.quantize = tokens_kernel<L>, c.quantize_threads = TOKEN_THREADS, c.quantize_shared = 0, c.k_parts = L::TILES;
    }
    c.rotated = rotated, c.f16_steps = f16_steps, c.limit = 2e-2;
    if (K::PARAMS == Params::NONE) c.key_scale = 0.0173f;
    if (V::PARAMS == Params::NONE) c.value_scale = 0.0117f;
    PlainScheme k{K::CODES, K::PARAMS, K::BITS, (rotated & ROTATED_KEYS) != 0, f16_steps, c.key_scale}, v{V::CODES, V::PARAMS, V::BITS, (rotated & ROTATED_VALUES) != 0, f16_steps, c.value_scale};
    c.plain = [=](const void* x, const void* y, float* to_k, float* to_v, int rows, int tokens, int packed_k, int packed_v, int kind) {
        plain_side(x, to_k, rows, tokens, packed_k, L::D, L::GROUP, k, false, kind), plain_side(y, to_v, rows, tokens, packed_v, L::D, L::GROUP, v, true, kind);
    };
    return c;
}

template <class L>
std::vector<Variant> usual() {
#ifdef PACKING
    return {};
#endif
    return {variant<L, 1, attend_warps<L>(), attend_stages<L>()>()};
}

template <class L>
std::vector<Variant> several() {
    return {variant<L, 1, 8, 2>(), variant<L, 1, 4, 3>()};
}

#ifdef TIMES
#define FORMAT(NAME, TYPE, ROTATED, STEPS) all.push_back(format<TYPE<128>>(NAME, several<TYPE<128>>(), ROTATED, STEPS));
#elif defined(HEAD_DIM)
#define FORMAT(NAME, TYPE, ROTATED, STEPS) all.push_back(format<TYPE<HEAD_DIM>>(NAME, usual<TYPE<HEAD_DIM>>(), ROTATED, STEPS));
#endif

std::vector<Config> everything() {
    std::vector<Config> all;
    const int both = ROTATED_KEYS | ROTATED_VALUES;
    FORMAT("e4m3", E4m3, 0, false)
    FORMAT("4bit_nc", FourBitNc, ROTATED_KEYS, false)
    FORMAT("kvarn k4v2", Kvarn42, both, false)
    FORMAT("3bit_nc", ThreeBitNc, ROTATED_KEYS, false)
#ifdef TIMES
    FORMAT("signed 4", Signed4, both, false)
#else
    FORMAT("e5m2", E5m2, 0, false)
    FORMAT("e4m3 fixed", E4m3Fixed, 0, false)
    FORMAT("e5m2 fixed", E5m2Fixed, 0, false)
    FORMAT("signed 4", Signed4, both, false)
    FORMAT("signed 3", Signed3, both, false)
    FORMAT("whole 4", Whole4, both, true)
    FORMAT("whole 3", Whole3, both, true)
    FORMAT("k8v4", K8V4, 0, false)
    FORMAT("k3v4_nc", K3V4Nc, ROTATED_KEYS, false)
    FORMAT("kvarn k4v4", Kvarn44, both, false)
    FORMAT("kvarn k3v3", Kvarn33, both, false)
    FORMAT("kvarn k2v2", Kvarn22, both, false)
    FORMAT("kvarn k4v4", Kvarn44Of64, both, false)
    FORMAT("kvarn k4v2", Kvarn42Of64, both, false)
    FORMAT("kvarn k3v3", Kvarn33Of64, both, false)
    FORMAT("kvarn k2v2", Kvarn22Of64, both, false)
#endif
    return all;
}

int main(int count, char** words) {
    std::string what = count > 1 ? words[1] : "check";
    OK(cudaSetDevice(0));
    auto all = everything();
#ifdef PACKING
    if (what == "check" || what == "small") check_packing(all, what == "small");
#else
    if (what == "check" || what == "small") check_all(all, what == "small", false);
#endif
    if (what == "time") {
        disorder = count < 3 || strcmp(words[2], "ordered");
        copy_gbs = copy_bandwidth();
        printf("copy: %.0f GB/s; an empty kernel: %.4f ms\n", copy_gbs, median_ms(60, [](int) { empty<<<264, 256>>>(); }));
        for (auto& c : all)
            for (int kind : {0, 1}) time_quantize(c, 8, 131072, kind);
        for (auto& c : all)
            for (auto& v : c.attend)
                if (v.fits())
                    for (int batch : {1, 8})
                        for (auto [kv, per] : {std::pair{32, 1}, {8, 4}}) time_attend(c, v, batch, kv, per, 131072);
        for (auto [batch, t] : BATCHES)
            for (auto& c : all)
                for (auto& v : c.attend) time_attend(c, v, batch, 8, 4, t);
    }
    OK(cudaDeviceSynchronize());
    return 0;
}

// Compares the kernels of hybrid-models with plain loops in f64, and times them. Needs only CUDA.
//
//     nvcc -O3 -std=c++17 -arch=sm_90a -I crates/hybrid-models/kernels -o scans benches/gpu/scans.cu
//     ./scans check && ./scans time
//
// `small` instead of `check` runs only short lengths, for compute-sanitizer. A name after `check`,
// `small` or `time` selects one kernel.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "conv.cu"
#include "rg_lru.cu"
#include "rows.cu"
#include "selective_scan.cu"
#include "ssd.cu"
#include "wkv.cu"

using namespace hybrid;
typedef long long i64;
typedef __nv_bfloat16 bf16;

void ok(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define OK(call) ok(call, __LINE__)

template <class T>
constexpr bool F32 = std::is_same<T, float>::value;
template <class T>
constexpr bool F16 = std::is_same<T, __half>::value;
// The entry point for a dtype.
#define PICK(T, name) (F16<T> ? name##_f16 : F32<T> ? name##_f32 : name##_bf16)
#define PICK16(T, name) (F16<T> ? name##_f16 : name##_bf16)
int parts(i64 n, int of) { return int((n + of - 1) / of); }

// ---- Inputs: normal numbers from a hash of the index ----

__device__ float noise(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull, x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull, x = (x ^ x >> 27) * 0x94d049bb133111ebull, x ^= x >> 31;
    float a = ((x & 0xffffff) + 1) * (1.f / 16777216.f), b = (x >> 24 & 0xffffff) * (1.f / 16777216.f);
    return sqrtf(-2.f * logf(a)) * cospif(2.f * b);
}

enum Kind { PLAIN, MINUS_EXP, DECAY };  // mean + spread n; minus its exponential; e^-e^ of it
template <class T>
__global__ void fill(T* x, i64 n, float mean, float spread, int kind, unsigned long long seed) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        float y = mean + spread * noise(seed * 0x100000000ull + i);
        x[i] = rounded<T>(kind == MINUS_EXP ? -expf(y) : kind == DECAY ? expf(-expf(y)) : y);
    }
}

std::vector<void*> buffers;
unsigned long long seeds = 1;
template <class T>
T* numbers(i64 n, float mean, float spread, int kind = PLAIN) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    buffers.push_back(p);
    fill<<<1024, 256>>>(p, n, mean, spread, kind, seeds++);
    OK(cudaGetLastError());
    return p;
}
template <class T>
T* filled(i64 n, int byte) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    OK(cudaMemset(p, byte, n * sizeof(T)));
    buffers.push_back(p);
    return p;
}
template <class T>
T* poisoned(i64 n) {
    return filled<T>(n, 0xff);
}
void free_all() {
    OK(cudaDeviceSynchronize());
    for (void* p : buffers) OK(cudaFree(p));
    buffers.clear();
}

#include "plain.cuh"

// ---- Inputs, and launches according to args.cuh ----

template <class P>
void launch(void (*kernel)(P), dim3 grid, int threads, int shared, P p) {
    OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<grid, threads, shared>>>(p);
}

// Rows of `width` numbers in a matrix that is wider by `pad`.
template <class T>
void* rows(i64 n, int width, int pad, float mean, float spread) {
    return numbers<T>(n * (width + pad), mean, spread);
}

// The entry points selective_scan, selective_scan_few and selective_scan_generic
enum ScanForm { USUAL, FEW, ANY };
template <class T>
struct Scan {
    SelectiveScan p;
    int batch;
    ScanForm form;
    Scan(int batch, int tokens, int channels, int states, int pad, ScanForm form) : batch(batch), form(form) {
        i64 n = (i64)batch * tokens;
        int row = channels + pad, selected = states + pad;
        p = {rows<T>(n, channels, pad, 0, 1), rows<T>(n, channels, pad, -1, 1.5), rows<T>(n, channels, pad, 0, 1), rows<T>(n, states, pad, 0, 1),
             rows<T>(n, states, pad, 0, 1), numbers<float>(channels * states, 0.5, 0.8, MINUS_EXP), numbers<float>(channels, 1, 0.3),
             numbers<float>(channels, -2, 1), numbers<float>((i64)batch * channels * states, 0, 1), poisoned<T>(n * channels), tokens, channels, states,
             row, row, row, selected, selected, channels};
    }
    void run() {
        if (form == ANY) PICK(T, selective_scan_generic)<<<dim3(parts(p.channels, 4), batch), 128>>>(p);
        else if (form == FEW) launch(PICK(T, selective_scan_few), dim3(parts(p.channels, 40), batch), 320, SCAN_FEW_SHARED, p);
        else launch(PICK(T, selective_scan), dim3(parts(p.channels, 32), batch), 128, SCAN_SHARED, p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.channels; }
    i64 states() { return (i64)batch * p.channels * p.states; }
    void plainly(double* state, double* y) { plain<T><<<dim3(parts(p.channels, 32), batch), 32>>>(p, state, y); }
    double bytes() { return (double)batch * p.tokens * (4. * p.channels + 2 * p.states) * sizeof(T) + states() * 8. + p.channels * p.states * 4.; }
};

enum SsdKernel { SSD, SSD_WGMMA, SSD_ANY };  // Which kernel
template <class T>
struct Ssds {
    Ssd p;
    int batch;
    SsdKernel which;
    Ssds(int batch, int tokens, int heads, int dim, int groups, int states, int pad, SsdKernel which) : batch(batch), which(which) {
        i64 n = (i64)batch * tokens, group_tiles = (i64)batch * groups * (parts(tokens, 64) + 1);
        int selected = groups * states;
        p = {rows<T>(n, heads * dim, pad, 0, 1), rows<T>(n, selected, pad, 0, 1), rows<T>(n, selected, pad, 0, 1), rows<T>(n, heads, pad, -1, 1.5),
             numbers<float>(heads, 0, 1, MINUS_EXP), numbers<float>(heads, 1, 0.3), numbers<float>(heads, -2, 1),
             numbers<float>((i64)batch * heads * states * dim, 0, 1), poisoned<T>(n * heads * dim),
             which == SSD_WGMMA ? poisoned<char>(group_tiles * (states == 64 ? SSD_GROUP_TILES_64 : SSD_GROUP_TILES_128)) : nullptr, tokens, heads, dim, groups,
             states, heads * dim + pad, selected + pad, selected + pad, heads + pad, heads * dim, 0.001f, 5.f};
    }
    void run() {
        bool small = p.states == 64;
        if constexpr (F32<T>) ssd_generic_f32<<<dim3(parts(p.head_dim, 32), p.heads, batch), 128>>>(p);
        else if (which == SSD_ANY) PICK(T, ssd_generic)<<<dim3(parts(p.head_dim, 32), p.heads, batch), 128>>>(p);
        else if (which == SSD) launch(PICK16(T, ssd), dim3(2, p.heads, batch), SSD_THREADS, small ? SSD_SHARED_64 : SSD_SHARED_128, p);
        else {
            launch(PICK16(T, ssd_group_tiles), dim3(parts(p.tokens, 64), p.groups, batch), SSD_GROUP_TILES_THREADS, 0, p);
            dim3 grid(p.groups * parts(p.heads / p.groups, SSD_CLUSTER) * SSD_CLUSTER, batch);
            launch(PICK16(T, ssd_wgmma), grid, SSD_WGMMA_THREADS, small ? SSD_WGMMA_SHARED_64 : SSD_WGMMA_SHARED_128, p);
        }
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.heads * p.head_dim; }
    i64 states() { return (i64)batch * p.heads * p.states * p.head_dim; }
    void plainly(double* state, double* y) { plain<T><<<dim3(p.heads, batch), p.head_dim>>>(p, state, y); }
    double bytes() {
        return (double)batch * p.tokens * (2. * p.heads * p.head_dim + 2 * p.groups * p.states + p.heads) * sizeof(T) + states() * 8.;
    }
};

template <class T>
struct Wkvs {
    Wkv p;
    int batch;
    bool any;
    int blocks;  // In chunks: of a head
    // large: there is no decay, and states grow beyond f16's range while outputs do not.
    Wkvs(int version, int batch, int tokens, int heads, int dim, int pad, bool any, int blocks = 2, bool large = false)
        : batch(batch), any(any), blocks(blocks) {
        i64 n = (i64)batch * tokens;
        int width = heads * dim, row = width + pad;
        bool six = version == 6;
        float mean = large ? 80 : 0, forgets = large ? -25 : -3, spread = large ? 0.1 : 2;
        p = {rows<T>(n, width, pad, 0, large ? 2e-5 : 1), rows<T>(n, width, pad, mean, 1), rows<T>(n, width, pad, mean, 1),
             six ? rows<T>(n, width, pad, 0, 1) : nullptr, numbers<float>(width, forgets, spread, six ? PLAIN : DECAY), numbers<float>(width, 0, 1),
             numbers<float>((i64)batch * width * dim, 0, 1), poisoned<T>(n * width), tokens, heads, dim, row, row, row, row, width};
    }
    void run() {
        dim3 grid(parts(p.dim, 32), p.heads, batch), fast(blocks, p.heads, batch);
        if constexpr (F32<T>) p.w ? wkv6_generic_f32<<<grid, 128>>>(p) : wkv5_generic_f32<<<grid, 128>>>(p);
        else if (any) p.w ? PICK(T, wkv6_generic)<<<grid, 128>>>(p) : PICK(T, wkv5_generic)<<<grid, 128>>>(p);
        else launch(p.w ? PICK16(T, wkv6) : PICK16(T, wkv5), fast, WKV_THREADS, WKV_SHARED + (WKV_THREADS / 32 - 2) * WKV_PRODUCER_SHARED, p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.heads * p.dim; }
    i64 states() { return (i64)batch * p.heads * p.dim * p.dim; }
    void plainly(double* state, double* y) { plain<T><<<dim3(p.heads, batch), p.dim>>>(p, state, y); }
    double bytes() { return outputs() * (p.w ? 5. : 4.) * sizeof(T) + states() * 8.; }
};

template <class T>
struct Wkv7s {
    Wkv7 p;
    int batch;
    bool any;
    int blocks;  // In chunks: of a head
    double* own = nullptr;
    Wkv7s(int batch, int tokens, int heads, int dim, int pad, bool any, int blocks = 2) : batch(batch), any(any), blocks(blocks) {
        i64 n = (i64)batch * tokens;
        int width = heads * dim, row = width + pad;
        auto input = [&] { return rows<T>(n, width, pad, 0, 1); };
        auto weight = [&](float mean) { return numbers<float>(width, mean, 0.5); };
        p = {input(), input(), input(), input(), input(), weight(-2), weight(0), weight(1), weight(1), weight(0),
             numbers<float>((i64)batch * width * dim, 0, 1), poisoned<T>(n * width), poisoned<float>(n * heads), tokens, heads, dim, row, row, row, row, row, width};
    }
    void run() {
        if (any) PICK(T, wkv7_generic)<<<dim3(parts(p.dim, 32), p.heads, batch), 128>>>(p);
        else if constexpr (F32<T>) wkv7_f32<<<dim3(2, p.heads, batch), DELTA_THREADS>>>(p);
        else launch(PICK16(T, wkv7), dim3(blocks, p.heads, batch), WKV7_THREADS, WKV7_SHARED, p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.heads * p.dim; }
    i64 states() { return (i64)batch * p.heads * p.dim * p.dim; }
    void plainly(double* state, double* y) {
        own = poisoned<double>((i64)batch * p.tokens * p.heads);
        plain<T><<<dim3(p.heads, batch), p.dim>>>(p, state, y, own);
    }
    double bytes() { return outputs() * 6. * sizeof(T) + states() * 8.; }
};

template <class T>
struct Wkv4s {
    Wkv4 p;
    int batch;
    Wkv4s(int batch, int tokens, int channels, int pad) : batch(batch) {
        i64 n = (i64)batch * tokens;
        float* state = numbers<float>((i64)batch * 3 * channels, 1, 0.1);
        p = {rows<T>(n, channels, pad, 0, 1), rows<T>(n, channels, pad, 0, 1), numbers<float>(channels, -2, 1, MINUS_EXP), numbers<float>(channels, 0, 1),
             state, state + channels, state + 2 * channels, poisoned<T>(n * channels), tokens, channels, 3 * channels,
             channels + pad, channels + pad, channels};
    }
    void run() {
        PICK(T, wkv4)<<<dim3(parts(p.channels, 128), batch), 128>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.channels; }
    i64 states() { return (i64)batch * 3 * p.channels; }
    void plainly(double* state, double* y) { plain<T><<<dim3(parts(p.channels, 32), batch), 32>>>(p, state, y); }
    double bytes() { return outputs() * 3. * sizeof(T) + states() * 8.; }
};

template <class T>
struct Lru {
    RgLru p;
    int batch;
    Lru(int batch, int tokens, int channels, int pad, int block, bool gate, bool first) : batch(batch) {
        i64 n = (i64)batch * tokens;
        int row = channels + pad, gate_row = block < channels ? block : row, stride = block < channels ? int(n * block) : 0;
        p = {rows<T>(n, channels, pad, 0, 1), rows<T>(n, channels, pad, 0, 1), rows<T>(n, channels, pad, 0, 1),
             gate ? rows<T>(n, channels, pad, 0, 1) : nullptr, numbers<float>(channels, 0, 1), numbers<float>(channels, 0, 1),
             numbers<float>(channels, -1, 1, MINUS_EXP), numbers<float>((i64)batch * channels, 0, 1), poisoned<T>(n * channels),
             poisoned<char>(256 + 1024ll * batch * parts(channels, LRU_TILE) * parts(tokens, LRU_CHUNK)), batch, tokens, channels, row, gate_row, channels, row,
             block, stride, first};
    }
    void run() {
        int blocks = parts(p.channels, LRU_TILE) * parts(p.tokens, LRU_CHUNK) * batch;
        if (p.tokens > LRU_CHUNK) OK(cudaMemsetAsync(p.scratch, 0, 256 + 1024ll * blocks));
        PICK(T, rg_lru)<<<blocks, LRU_THREADS>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.channels; }
    i64 states() { return (i64)batch * p.channels; }
    void plainly(double* state, double* y) { plain<T><<<dim3(parts(p.channels, 32), batch), 32>>>(p, state, y); }
    double bytes() { return outputs() * (p.gate ? 5. : 4.) * sizeof(T) + states() * 8.; }
};

template <class T>
struct Convs {
    Conv p;
    int batch;
    Convs(int batch, int tokens, int channels, int taps, bool silu, int pad) : batch(batch) {
        i64 n = (i64)batch * tokens;
        p = {rows<T>(n, channels, pad, 0, 1), numbers<float>(taps * channels, 0, 1), numbers<float>(channels, 0, 1),
             numbers<float>((i64)batch * (taps - 1) * channels, 0, 1), poisoned<T>(n * channels), tokens, channels, taps, silu, channels + pad, channels};
    }
    void run() {
        PICK(T, conv)<<<dim3(parts(p.channels, 256), parts(p.tokens, 64), batch), 128>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.channels; }
    i64 states() { return (i64)batch * (p.taps - 1) * p.channels; }
    void plainly(double* state, double* y) { plain<T><<<dim3(parts(p.channels, 32), batch), 32>>>(p, state, y); }
    double bytes() { return outputs() * 2. * sizeof(T) + states() * 8.; }
};

#include "rows.cuh"

// ---- Checks ----

template <class T>
double error_of(const T* got, const double* want, i64 n) {
    std::vector<T> g(n);
    std::vector<double> w(n);
    OK(cudaMemcpy(g.data(), got, n * sizeof(T), cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(w.data(), want, n * sizeof(double), cudaMemcpyDeviceToHost));
    double off = 0, size = 0;
    for (i64 i = 0; i < n; i++) off += pow((double)(float)g[i] - w[i], 2), size += w[i] * w[i];
    return size > 0 ? sqrt(off / size) : sqrt(off);
}

const char* only = nullptr;
bool wanted(const char* name) { return !only || !strncmp(name, only, strlen(only)); }

struct Worst {
    int cases = 0, failed = 0;
    double y = 0, state = 0;
};

// The error of a kernel's further results, relative to the allowed one. RWKV-7's shares are sums of
// rounded numbers that can cancel.
template <class K>
double beside(K&) {
    return 0;
}
template <class T>
double beside(Wkv7s<T>& k) {
    return k.p.bonus ? error_of(k.p.bonus, k.own, (i64)k.batch * k.p.tokens * k.p.heads) / (F32<T> || k.any ? 1e-5 : 3e-3) : 0;
}

// Checks outputs to the rounding of their dtype, and states to `state_limit`.
template <class T, class K>
void check(K k, float* state, double state_limit, const char* name, Worst& worst, double y_limit = 0) {
    double *y = poisoned<double>(k.outputs()), *s = poisoned<double>(k.states());
    k.plainly(s, y);
    OK(cudaGetLastError());
    k.run();
    double y_off = error_of((T*)k.p.y, y, k.outputs()), s_off = error_of(state, s, k.states());
    if (!y_limit) y_limit = F32<T> ? 1e-5 : F16<T> ? 1e-3 : 5e-3;
    worst.cases++;
    if (!(y_off <= worst.y)) worst.y = y_off;
    if (!(s_off <= worst.state)) worst.state = s_off;
    if (!(y_off <= y_limit && s_off <= state_limit && beside(k) <= 1)) {
        if (worst.failed++ < 6) printf("FAILED %s, %d tokens, batch %d: off by %g, state by %g\n", name, k.p.tokens, k.batch, y_off, s_off);
    }
    free_all();
}

template <class T>
void check_all(const char* type, bool small) {
    const double state_limit = 2e-5, fast_limit = 2e-5;
    auto each = [&](const char* name, std::function<void(int, int, Worst&)> f) {
        if (!wanted(name)) return;
        Worst worst;
        for (int tokens : {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 257, 1000, 4099}) {
            if (small && (tokens > 257 || tokens % 8 > 1)) continue;
            for (int batch : {1, 3}) {
                if (!small || batch > 1) f(tokens, batch, worst);
            }
        }
        printf("%-20s %s: %d cases, %d failed; outputs off by at most %.2g, states by %.2g\n", name, type, worst.cases, worst.failed, worst.y, worst.state);
    };
    each("selective_scan", [&](int tokens, int batch, Worst& w) {
        for (int channels : {16, 40, 333}) {
            Scan<T> k(batch, tokens, channels, 16, channels % 2 ? 1 : 8, USUAL);
            check<T>(k, k.p.state, state_limit, "selective_scan", w);
        }
    });
    each("selective_scan_few", [&](int tokens, int batch, Worst& w) {
        for (int channels : {16, 40, 333}) {
            Scan<T> k(batch, tokens, channels, 16, channels % 2 ? 1 : 8, FEW);
            check<T>(k, k.p.state, state_limit, "selective_scan_few", w);
        }
    });
    each("selective_scan_generic", [&](int tokens, int batch, Worst& w) {
        for (int channels : {5, 72}) {
            Scan<T> k(batch, tokens, channels, channels == 5 ? 7 : 33, 3, ANY);
            if (channels == 5) k.p.z = nullptr;
            check<T>(k, k.p.state, state_limit, "selective_scan_generic", w);
        }
    });
    // The chunked kernel rounds the additions to a state to T: errors of states were 2.5e-4 in f16
    // and 1.8e-3 in bf16.
    const double rounded_limit = F16<T> ? 4e-4 : 3e-3;
    if (!F32<T>) {
        for (SsdKernel which : {SSD, SSD_WGMMA}) {
            const char* name = which == SSD ? "ssd" : "ssd_wgmma";
            each(name, [&](int tokens, int batch, Worst& w) {
                for (int states : {64, 128}) {
                    Ssds<T> k(batch, tokens, states == 64 ? 4 : 3, 64, states == 64 ? 2 : 1, states, 8, which);
                    check<T>(k, k.p.state, rounded_limit, name, w);
                }
            });
        }
    }
    each("ssd_generic", [&](int tokens, int batch, Worst& w) {
        for (int states : {24, 128, 200}) {
            Ssds<T> k(batch, tokens, 4, states == 24 ? 20 : 64, 2, states, 3, SSD_ANY);
            check<T>(k, k.p.state, state_limit, "ssd_generic", w);
        }
    });
    for (int version : {5, 6}) {
        std::string name = version == 5 ? "wkv5" : "wkv6";
        // Operands of matrix products are rounded to T: keys and receptances times their decays,
        // and S for outputs. With few tokens, one rounded A(t, t) affects all outputs: the error
        // was 1.1e-2 in bf16.
        if (!F32<T>) each(name.c_str(), [&](int tokens, int batch, Worst& w) {
            const double y_limit = (F16<T> ? 1e-3 : 5.5e-3) * (tokens < 16 ? 2.5 : 1), s_limit = F16<T> ? 4.5e-4 : 3.5e-3;
            for (int blocks : {1, 2}) {
                for (int heads : {1, 5}) {
                    Wkvs<T> k(version, batch, tokens, heads, 64, 8, false, blocks);
                    check<T>(k, k.p.state, s_limit, name.c_str(), w, y_limit);
                }
                Wkvs<T> k(version, batch, tokens, 2, 64, 8, false, blocks, true);
                check<T>(k, k.p.state, s_limit, name.c_str(), w, y_limit);
            }
        });
        each((name + "_generic").c_str(), [&](int tokens, int batch, Worst& w) {
            for (int dim : {16, 64, 100}) {
                Wkvs<T> k(version, batch, tokens, 3, dim, 1, true);
                check<T>(k, k.p.state, state_limit, "wkv_generic", w);
            }
        });
    }
    // Chunked RWKV-7 rounds the operands of products with the state to f16: the error relative to
    // the norm was up to 3.8e-4.
    each("wkv7", [&](int tokens, int batch, Worst& w) {
        for (int heads : {1, 5}) {
            for (int blocks : {1, 2}) {
                Wkv7s<T> k(batch, tokens, heads, 64, 8, false, blocks);
                if (heads == 1) k.p.bonus = nullptr;
                check<T>(k, k.p.state, F32<T> ? fast_limit : 5e-4, "wkv7", w);
            }
        }
    });
    each("wkv7_generic", [&](int tokens, int batch, Worst& w) {
        for (int dim : {16, 64, 100}) {
            Wkv7s<T> k(batch, tokens, 3, dim, 1, true);
            check<T>(k, k.p.state, state_limit, "wkv7_generic", w);
        }
    });
    each("wkv4", [&](int tokens, int batch, Worst& w) {
        Wkv4s<T> k(batch, tokens, 333, 1);
        check<T>(k, k.p.numerator, state_limit, "wkv4", w);
    });
    each("rg_lru", [&](int tokens, int batch, Worst& w) {
        for (int channels : {48, 128, 333}) {
            Lru<T> k(batch, tokens, channels, channels % 2 ? 1 : 8, channels == 128 ? 32 : channels, channels != 128, channels != 48);
            check<T>(k, k.p.state, state_limit, "rg_lru", w);
        }
    });
    each("conv", [&](int tokens, int batch, Worst& w) {
        for (int channels : {48, 1000, 333}) {
            Convs<T> k(batch, tokens, channels, channels == 48 ? 2 : 4, channels != 333, channels % 2 ? 1 : 8);
            check<T>(k, k.p.state, state_limit, "conv", w);
        }
    });
    const double sum_limit = 1e-6;
    each("rows_norm", [&](int tokens, int batch, Worst& w) {
        for (int channels : {40, 333, 4200}) {
            if (channels > 1000 && tokens > 257) continue;
            Norms<T, false> k(batch, tokens, channels, channels != 40, channels != 333);
            check<T>(k, k.p.x, sum_limit, "rows_norm", w);
            Norms<T, true> wide(batch, tokens, channels, channels == 40, channels == 333);
            check<float>(wide, wide.p.x, sum_limit, "rows_norm_wide", w);
        }
    });
    each("rows_gated_norm", [&](int tokens, int batch, Worst& w) {
        for (int group : {20, 333, 640}) {
            GatedNorms<T> k(batch, tokens, group == 640 ? 1 : 2, group, group == 333 ? 1 : 8);
            check<T>(k, nullptr, 0, "rows_gated_norm", w);
        }
    });
    each("rows_head_norm", [&](int tokens, int batch, Worst& w) {
        for (int dim : {16, 64, 100, 33}) {
            HeadNorms<T> k(batch, tokens, 5, dim, dim % 3 == 1);
            check<T>(k, nullptr, 0, "rows_head_norm", w);
        }
    });
    each("rows_shift", [&](int tokens, int batch, Worst& w) {
        for (int channels : {48, 333, 1040}) {
            Shifts<T> k(batch, tokens, channels, channels == 48 ? 6 : channels == 333 ? 1 : 4, channels != 1040);
            check<T>(k, k.p.last, sum_limit, "rows_shift", w);
        }
    });
    each("rows_gate", [&](int tokens, int batch, Worst& w) {
        for (int function : {GATE_SILU, GATE_GELU, GATE_SIGMOID, GATE_RELU}) {
            Gates<T> k(batch, tokens, function % 2 ? 333 : 56, function % 2 ? 1 : 8, function, function > 1);
            check<T>(k, nullptr, 0, "rows_gate", w);
        }
    });
    each("rows_blend", [&](int tokens, int batch, Worst& w) {
        for (int channels : {48, 333}) {
            Blends<T> k(batch, tokens, channels);
            check<T>(k, nullptr, 0, "rows_blend", w);
        }
    });
    each("rows_bias", [&](int tokens, int batch, Worst& w) {
        for (int channels : {48, 333}) {
            Biases<T> k(batch, tokens, channels);
            check<T>(k, nullptr, 0, "rows_bias", w);
        }
    });
}

// ---- Times: medians of 30 between events ----

double milliseconds(std::function<void()> f) {
    cudaEvent_t from, to;
    OK(cudaEventCreate(&from)), OK(cudaEventCreate(&to));
    std::vector<float> times(30);
    for (int i = 0; i < 3; i++) f();
    for (float& time : times) {
        OK(cudaEventRecord(from));
        f();
        OK(cudaEventRecord(to)), OK(cudaEventSynchronize(to)), OK(cudaEventElapsedTime(&time, from, to));
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

double copy_speed() {
    const i64 large = 1ll << 30;
    char *from = (char*)numbers<float>(large / 4, 0, 1), *to = poisoned<char>(large);
    double copy = 2 * large / milliseconds([&] { OK(cudaMemcpyAsync(to, from, large, cudaMemcpyDeviceToDevice)); }) / 1e6;
    printf("copy: %.0f GB/s\n", copy);
    free_all();
    return copy;
}

template <class K>
void time_one(const char* name, K k, double copy) {
    double ms = milliseconds([&] { k.run(); }), speed = k.bytes() / ms / 1e6;
    printf("%-34s batch %d, %5d tokens: %.4f ms, %.0f GB/s, %.0f%% of copy\n", name, k.batch, k.p.tokens, ms, speed, 100 * speed / copy);
    free_all();
}

template <class T>
void time_all(double copy) {
    int processors;
    OK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    for (int tokens : {8192, 1}) {
        for (int batch : {1, 4, 8}) {
            bool any = tokens == 1;
            if (wanted("selective_scan")) time_one("selective_scan, mamba-2.8b", Scan<T>(batch, tokens, 5120, 16, 0, USUAL), copy);
            if (wanted("selective_scan_few") && !any && batch == 1) time_one("selective_scan_few, mamba-2.8b", Scan<T>(batch, tokens, 5120, 16, 0, FEW), copy);
            if (wanted("selective_scan") && any) time_one("selective_scan_generic, mamba-2.8b", Scan<T>(batch, tokens, 5120, 16, 0, ANY), copy);
            if (wanted("ssd") && !any) time_one("ssd, mamba2-2.7b", Ssds<T>(batch, tokens, 80, 64, 1, 128, 0, SSD), copy);
            if (wanted("ssd_wgmma") && !any) time_one("ssd_wgmma, mamba2-2.7b", Ssds<T>(batch, tokens, 80, 64, 1, 128, 0, SSD_WGMMA), copy);
            if (wanted("ssd_generic") && any) time_one("ssd_generic, mamba2-2.7b", Ssds<T>(batch, tokens, 80, 64, 1, 128, 0, SSD_ANY), copy);
            if (wanted("wkv5")) time_one("wkv5, RWKV-5-7B", Wkvs<T>(5, batch, tokens, 64, 64, 0, any, 128 * batch > processors ? 1 : 2), copy);
            if (wanted("wkv6")) time_one("wkv6, RWKV-6-7B", Wkvs<T>(6, batch, tokens, 64, 64, 0, any, 128 * batch > processors ? 1 : 2), copy);
            if (wanted("wkv7")) time_one("wkv7, 64 heads", Wkv7s<T>(batch, tokens, 64, 64, 0, any, 128 * batch > processors ? 1 : 2), copy);
            if (wanted("rg_lru")) time_one("rg_lru, RecurrentGemma-2B", Lru<T>(batch, tokens, 2560, 0, 2560, false, false), copy);
            if (wanted("rg_lru")) time_one("rg_lru, blocks of 256, gate", Lru<T>(batch, tokens, 2560, 0, 256, true, false), copy);
            if (wanted("conv")) time_one("conv, mamba-2.8b", Convs<T>(batch, tokens, 5120, 4, true, 0), copy);
            if (wanted("rows_norm")) time_one("rows_norm, 2,560 channels", Norms<T, false>(batch, tokens, 2560, true, false), copy);
            if (wanted("rows_norm")) time_one("rows_norm_wide, 4,096 channels", Norms<T, true>(batch, tokens, 4096, true, true), copy);
            if (wanted("rows_gated_norm")) time_one("rows_gated_norm, mamba2-2.7b", GatedNorms<T>(batch, tokens, 1, 5120, 0), copy);
            if (wanted("rows_head_norm")) time_one("rows_head_norm, RWKV-5-7B", HeadNorms<T>(batch, tokens, 64, 64, false), copy);
            if (wanted("rows_shift")) time_one("rows_shift, 4 mixes, RWKV-5-7B", Shifts<T>(batch, tokens, 4096, 4, false), copy);
            if (wanted("rows_gate")) time_one("rows_gate, GELU, RecurrentGemma-2B", Gates<T>(batch, tokens, 7680, 7680, GATE_GELU, true), copy);
            if (wanted("rows_bias")) time_one("rows_bias, 2,560 channels", Biases<T>(batch, tokens, 2560), copy);
        }
    }
}

int main(int argc, char** argv) {
    const char* what = argc > 1 ? argv[1] : "check";
    if (argc > 2) only = argv[2];
    if (!strcmp(what, "time")) {
        time_all<__half>(copy_speed());
    } else {
        bool small = !strcmp(what, "small");
        check_all<float>("f32", small);
        check_all<__half>("f16", small);
        check_all<bf16>("bf16", small);
    }
}

// Checks the scans of hybrid-models against plain ones in f64, and times them. Needs nothing but CUDA.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I crates/hybrid-models/kernels -o scans benches/gpu/scans.cu && ./scans check && ./scans time
//
// `small` in place of `check` takes short lengths only, for compute-sanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "selective_scan.cuh"
#include "wkv5.cuh"

using namespace hybrid;
typedef long long i64;

void ok(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define OK(call) ok(call, __LINE__)

// ---- Inputs: normal numbers from a hash of the index ----

__device__ float noise(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull, x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull, x = (x ^ x >> 27) * 0x94d049bb133111ebull, x ^= x >> 31;
    float a = ((x & 0xffffff) + 1) * (1.f / 16777216.f), b = (x >> 24 & 0xffffff) * (1.f / 16777216.f);
    return sqrtf(-2.f * logf(a)) * cospif(2.f * b);
}
__device__ float number(const float* p, i64 i) { return p[i]; }
__device__ void put(float* p, i64 i, float x) { p[i] = x; }

// Plain: mean + spread n; `kind` 1: minus its exponential (A); 2: e^-e^ of it (a decay).
template <class T>
__global__ void fill(T* x, i64 n, float mean, float spread, int kind, unsigned long long seed) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        float y = mean + spread * noise(seed * 0x100000000ull + i);
        put(x, i, kind == 1 ? -expf(y) : kind == 2 ? expf(-expf(y)) : y);
    }
}

std::vector<void*> buffers;
unsigned long long seeds = 1;
template <class T>
T* random_numbers(i64 n, float mean, float spread, int kind = 0) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    buffers.push_back(p);
    fill<<<1024, 256>>>(p, n, mean, spread, kind, seeds++);
    OK(cudaGetLastError());
    return p;
}
template <class T>
T* poisoned(i64 n) {
    T* p;
    OK(cudaMalloc(&p, n * sizeof(T)));
    OK(cudaMemset(p, 0xff, n * sizeof(T)));
    buffers.push_back(p);
    return p;
}
void free_all() {
    OK(cudaDeviceSynchronize());
    for (void* p : buffers) OK(cudaFree(p));
    buffers.clear();
}

// ---- The plain side, in f64: one thread for a channel, and one for a column ----

template <class T>
__global__ void plain_scan(SelectiveScan p, double* state, double* y) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.channels) return;
    double h[STATES];
    i64 entry = (i64)blockIdx.y * p.channels + c;
    for (int n = 0; n < STATES; n++) h[n] = p.state[entry * STATES + n];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t, at = row * p.channels + c;
        double u = number((const T*)p.u, at), z = number((const T*)p.z, at), dt = log1p(exp((double)number((const T*)p.steps, at) + p.bias[c]));
        double sum = p.d[c] * u;
        for (int n = 0; n < STATES; n++) {
            h[n] = exp(dt * p.a[c * STATES + n]) * h[n] + dt * u * number((const T*)p.b, row * STATES + n);
            sum += h[n] * number((const T*)p.c, row * STATES + n);
        }
        y[at] = sum * z / (1 + exp(-z));
    }
    for (int n = 0; n < STATES; n++) state[entry * STATES + n] = h[n];
}

template <class T>
__global__ void plain_wkv(Wkv5 p, double* state, double* y) {
    int j = threadIdx.x, head = blockIdx.x, width = p.heads * HEAD;
    i64 base = ((i64)blockIdx.y * p.heads + head) * HEAD * HEAD + j;
    double s[HEAD];
    for (int i = 0; i < HEAD; i++) s[i] = p.state[base + i * HEAD];
    for (int t = 0; t < p.tokens; t++) {
        i64 at = ((i64)blockIdx.y * p.tokens + t) * width + head * HEAD;
        double sum = 0, v = number((const T*)p.v, at + j);
        for (int i = 0; i < HEAD; i++) {
            double r = number((const T*)p.r, at + i), kv = number((const T*)p.k, at + i) * v;
            sum += r * (s[i] + p.u[head * HEAD + i] * kv);
            s[i] = p.w[head * HEAD + i] * s[i] + kv;
        }
        y[at + j] = sum;
    }
    for (int i = 0; i < HEAD; i++) state[base + i * HEAD] = s[i];
}

// ---- Checks ----

template <class T>
double error_of(const T* got, const double* want, i64 n) {
    std::vector<T> g(n);
    std::vector<double> w(n);
    OK(cudaMemcpy(g.data(), got, n * sizeof(T), cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(w.data(), want, n * sizeof(double), cudaMemcpyDeviceToHost));
    double off = 0, size = 0;
    for (i64 i = 0; i < n; i++) off += pow((double)(float)g[i] - w[i], 2), size += w[i] * w[i];
    return sqrt(off / size);
}

int cases = 0;
double worst_y = 0, worst_state = 0;
void judge(const char* name, int tokens, double y, double state, double limit) {
    cases++, worst_y = std::max(worst_y, y), worst_state = std::max(worst_state, state);
    if (y <= limit && state <= 1e-5) return;  // NaN fails.
    printf("%s, %d tokens: off by %g, state by %g\n", name, tokens, y, state);
    exit(1);
}

template <class T>
SelectiveScan scan_inputs(int batch, int tokens, int channels) {
    i64 n = (i64)batch * tokens;
    return {random_numbers<T>(n * channels, 0, 1), random_numbers<T>(n * channels, -1, 1.5), random_numbers<T>(n * channels, 0, 1),
            random_numbers<T>(n * STATES, 0, 1), random_numbers<T>(n * STATES, 0, 1), random_numbers<float>(channels * STATES, 0.5, 0.8, 1),
            random_numbers<float>(channels, 1, 0.3), random_numbers<float>(channels, -2, 1),
            random_numbers<float>((i64)batch * channels * STATES, 0, 1), poisoned<T>(n * channels), tokens, channels};
}
template <class T>
void run(SelectiveScan p, int batch) {
    selective_scan<T><<<dim3((p.channels + CHANNELS - 1) / CHANNELS, batch), SCAN_THREADS>>>(p);
    OK(cudaGetLastError());
}
template <class T>
Wkv5 wkv_inputs(int batch, int tokens, int heads) {
    i64 n = (i64)batch * tokens * heads * HEAD;
    return {random_numbers<T>(n, 0, 1), random_numbers<T>(n, 0, 1), random_numbers<T>(n, 0, 1), random_numbers<float>(heads * HEAD, -3, 2, 2),
            random_numbers<float>(heads * HEAD, 0, 1), random_numbers<float>((i64)batch * heads * HEAD * HEAD, 0, 1), poisoned<T>(n), tokens, heads};
}
template <class T>
void run(Wkv5 p, int batch) {
    wkv5<T><<<dim3(HEAD / VALUES, p.heads, batch), WKV_THREADS>>>(p);
    OK(cudaGetLastError());
}

template <class T>
void check(const char* type, double limit, bool small) {
    for (int tokens : {1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 1000, 4099}) {
        if (small && tokens > 33) break;
        for (int batch : {1, 3}) {
            for (int channels : {16, 40, 1000}) {
                SelectiveScan p = scan_inputs<T>(batch, tokens, channels);
                i64 n = (i64)batch * tokens * channels, states = (i64)batch * channels * STATES;
                double *y = poisoned<double>(n), *state = poisoned<double>(states);
                plain_scan<T><<<dim3((channels + 127) / 128, batch), 128>>>(p, state, y);
                run<T>(p, batch);
                judge(type, tokens, error_of((T*)p.y, y, n), error_of(p.state, state, states), limit);
                free_all();
            }
            for (int heads : {1, 5}) {
                Wkv5 p = wkv_inputs<T>(batch, tokens, heads);
                i64 n = (i64)batch * tokens * heads * HEAD, states = (i64)batch * heads * HEAD * HEAD;
                double *y = poisoned<double>(n), *state = poisoned<double>(states);
                plain_wkv<T><<<dim3(heads, batch), HEAD>>>(p, state, y);
                run<T>(p, batch);
                judge(type, tokens, error_of((T*)p.y, y, n), error_of(p.state, state, states), limit);
                free_all();
            }
        }
    }
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

void time_all() {
    const i64 large = 1ll << 30;
    char *from = (char*)random_numbers<float>(large / 4, 0, 1), *to = poisoned<char>(large);
    double copy = 2 * large / milliseconds([&] { OK(cudaMemcpyAsync(to, from, large, cudaMemcpyDeviceToDevice)); }) / 1e6;
    printf("copy: %.0f GB/s\n", copy);
    free_all();
    auto print = [&](const char* name, int batch, int tokens, double ms, double bytes) {
        printf("%s, batch %d, %d tokens: %.4f ms, %.0f GB/s, %.0f%% of copy\n", name, batch, tokens, ms, bytes / ms / 1e6, 100 * bytes / ms / 1e6 / copy);
    };
    for (int batch : {1, 4, 8}) {
        for (int tokens : {8192, 1}) {
            SelectiveScan p = scan_inputs<__half>(batch, tokens, 5120);
            double bytes = batch * (tokens * (5120. * 4 + 32) * 2 + 5120. * STATES * 8) + 5120. * STATES * 4;
            print("selective scan, mamba-2.8b", batch, tokens, milliseconds([&] { run<__half>(p, batch); }), bytes);
            free_all();
            Wkv5 q = wkv_inputs<__half>(batch, tokens, 64);
            bytes = batch * (tokens * 4096. * 4 * 2 + 4096. * HEAD * 8);
            print("wkv, RWKV-5-7B", batch, tokens, milliseconds([&] { run<__half>(q, batch); }), bytes);
            free_all();
        }
    }
}

int main(int argc, char** argv) {
    const char* what = argc > 1 ? argv[1] : "check";
    if (!strcmp(what, "time")) {
        time_all();
    } else {
        bool small = !strcmp(what, "small");
        check<__half>("f16", 1e-3, small);
        check<__nv_bfloat16>("bf16", 5e-3, small);
        printf("%d cases; the worst: outputs off by %g, states by %g\n", cases, worst_y, worst_state);
    }
}

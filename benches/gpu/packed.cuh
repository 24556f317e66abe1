// Functions shared by the programs that check and time kernels over packed caches: plain attention
// in f64, launches as in src/cuda, times.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attend.cuh"
#include "fill.cuh"
#include "sums.cuh"
#include "unpack.cuh"

void ok(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define OK(call) ok(call, __LINE__)

using namespace kvq;
typedef long long i64;

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
};

// ---- The reference ----

__device__ float noise(unsigned long long i) {  // Normal numbers from a hash of the index.
    auto mix = [](unsigned long long x) {
        x += 0x9e3779b97f4a7c15ull, x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull, x = (x ^ x >> 27) * 0x94d049bb133111ebull;
        return x ^ x >> 31;
    };
    unsigned long long h = mix(i);
    float u = ((h & 0xffffff) + 1) * (1.f / 16777216.f), v = (h >> 24 & 0xffffff) * (1.f / 16777216.f);
    return sqrtf(-2.f * logf(u)) * cospif(2.f * v);
}

__device__ float number(const void* p, i64 i, int kind) {
    return kind ? __bfloat162float(((const __nv_bfloat16*)p)[i]) : __half2float(((const __half*)p)[i]);
}

// The mean and the scale depend on the channel, as in real keys.
__global__ void fill(void* x, i64 n, int d, float spread, int kind, unsigned long long seed) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        int c = i % d;
        float y = noise(seed + i) * (1.f + spread * (c % 7 == 0)) + spread * noise(c + 12345);
        if (kind) ((__nv_bfloat16*)x)[i] = __float2bfloat16(y);
        else ((__half*)x)[i] = __float2half(y);
    }
}

struct Plain {
    const void* q;
    const float *k, *v;
    double *scores, *out, *lse;
    int tokens, d, columns, queries, kv_heads, causal, window, kind;
    float scale, soft_cap;
    // Returns the row in [tokens, heads, D] of a column of a sequence's kv head.
    __host__ __device__ i64 row_of(int row, int column) const {
        int per_kv = columns / queries;
        return ((i64)(row / kv_heads * queries + column % queries) * kv_heads + row % kv_heads) * per_kv + column / queries;
    }
};

__global__ void plain_scores(Plain a) {
    int row = blockIdx.y, column = blockIdx.z;
    int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= a.tokens) return;
    double sum = 0;
    for (int c = 0; c < a.d; c++) sum += (double)number(a.q, a.row_of(row, column) * a.d + c, a.kind) * a.k[((i64)row * a.tokens + token) * a.d + c];
    sum *= a.scale;
    if (a.soft_cap > 0) sum = a.soft_cap * tanh(sum / a.soft_cap);
    int to = a.causal ? a.tokens - a.queries + 1 + column % a.queries : a.tokens, from = a.causal && a.window ? to - a.window : 0;
    a.scores[(i64)(row * a.columns + column) * a.tokens + token] = token >= from && token < to ? sum : -INFINITY;
}

__global__ void plain_softmax(Plain a) {  // One block of 256 a column.
    __shared__ double part[256];
    double* s = a.scores + (i64)blockIdx.x * a.tokens;
    auto merge = [&](double x, bool add) {
        part[threadIdx.x] = x;
        __syncthreads();
        for (int i = 128; i; i /= 2) {
            if (threadIdx.x < i) part[threadIdx.x] = add ? part[threadIdx.x] + part[threadIdx.x + i] : fmax(part[threadIdx.x], part[threadIdx.x + i]);
            __syncthreads();
        }
        double y = part[0];
        __syncthreads();
        return y;
    };
    double top = -INFINITY, sum = 0;
    for (int i = threadIdx.x; i < a.tokens; i += 256) top = fmax(top, s[i]);
    top = merge(top, false);
    for (int i = threadIdx.x; i < a.tokens; i += 256) sum += s[i] = exp(s[i] - top);
    sum = merge(sum, true);
    for (int i = threadIdx.x; i < a.tokens; i += 256) s[i] /= sum;
    if (threadIdx.x == 0) a.lse[blockIdx.x] = top + log(sum);
}

// Blocks of D threads: (pieces of 1024 tokens, rows, columns).
__global__ void plain_values(Plain a) {
    int row = blockIdx.y, column = blockIdx.z;
    double sum = 0;
    for (int t = blockIdx.x * 1024; t < min(a.tokens, blockIdx.x * 1024 + 1024); t++)
        sum += a.scores[(i64)(row * a.columns + column) * a.tokens + t] * a.v[((i64)row * a.tokens + t) * a.d + threadIdx.x];
    atomicAdd(a.out + (i64)(row * a.columns + column) * a.d + threadIdx.x, sum);
}

// ---- Checks ----

template <class L, int N, int W, int S>
__global__ void __launch_bounds__(W * 32) attend_kernel(const AttendArgs args) {
    attend<L, N, W, S>(args);
}

template <class L>
__global__ void __launch_bounds__(SUM_WARPS * 32) sums_kernel(const AttendArgs args) {
    sums<L>(args);
}

template <class L>
__global__ void unpack_kernel(const UnpackArgs args) {
    unpack<L>(args);
}

// Sums |a - b|^2 and |b|^2 over the first `upto` tokens of each row.
__global__ void compare(const float* a, const float* b, int rows, int tokens, int upto, int d, double* sums) {
    double off = 0, norm = 0;
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (i64)rows * tokens * d; i += (i64)gridDim.x * blockDim.x)
        if (i / d % tokens < upto) off += (double)(a[i] - b[i]) * (a[i] - b[i]), norm += (double)b[i] * b[i];
    atomicAdd(sums, off), atomicAdd(sums + 1, norm);
}

struct Variant {
    int n, warps, stages, shared;
    void (*kernel)(const AttendArgs);
    // as src/cuda/kernels.rs has it, on a device of 227 KB
    bool fits() const { return shared <= 227 * 1024 - 4096; }
};

struct Config {
    std::string name;
    int group, d, record;
    // The quantizer, with one block per record, or per tile if a tile is larger.
    void (*quantize)(const FillArgs);
    int quantize_threads, quantize_shared, k_parts;
    // Quantizes and dequantizes the first packed keys and values of each row; copies the rest.
    std::function<void(const void* k, const void* v, float* yk, float* yv, int rows, int tokens, int packed_k, int packed_v, int kind)> plain;
    // The limit of the relative difference between the numbers of both quantizers. If it is not 0,
    // because ties can be rounded differently, attention is compared with plain attention over the
    // records' numbers.
    double limit;
    void (*unpack)(const UnpackArgs);
    void (*sums)(const AttendArgs);
    int sums_shared;
    std::vector<Variant> attend;
    int rotated = 0, f16_steps = 0;
    float key_scale = 1.f, value_scale = 1.f;
};

template <class L, int N, int W, int S>
Variant variant() {
    Variant v{N, W, S, attend_shared<L, N, W, S>(), attend_kernel<L, N, W, S>};
    if (v.fits()) OK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared));
    return v;
}

// Sets everything except the quantizers.
template <class L>
Config config(std::string name, std::vector<Variant> attend) {
    OK(cudaFuncSetAttribute(sums_kernel<L>, cudaFuncAttributeMaxDynamicSharedMemorySize, sums_shared<L>()));
    return {name, L::GROUP, L::D, L::RECORD, nullptr, 0, 0, 0, nullptr, 0, unpack_kernel<L>, sums_kernel<L>, sums_shared<L>(), attend};
}

Buffer<__half> raw_k, raw_v, query, ring_k, ring_v, out;
Buffer<float> ref_k, ref_v, got_k, got_v, lse, part_out, part_lse, prob_sums;
Buffer<double> scores, ref_out, ref_lse;
Buffer<unsigned char> packed;
Buffer<unsigned> arrived;
Buffer<unsigned long long> counters, table;
Buffer<FillRow> fill_rows;
Buffer<KvHead> fill_heads, kv_heads;
Buffer<Work> work;
std::vector<KvHead> new_heads;  // of `heads_of`, until `prepare` copies them to the device

unsigned blocks(i64 n) { return unsigned((n + 255) / 256); }

struct Case {
    int batch, kv_heads, per_kv, tokens, residual, queries, causal, window, kind;
    float soft_cap;
    bool staggered;  // values lag behind keys, as in KIVI's code
};

bool disorder = true;

// Writes the block tables of `rows` kv heads with `records` records each, in random or consecutive
// order.
void scatter(const Config& c, i64 rows, i64 records) {
    std::vector<unsigned long long> addresses(rows * records);
    packed.take(rows * records * c.record);
    for (i64 i = 0; i < rows * records; i++) addresses[i] = (unsigned long long)(packed.p + i * c.record);
    if (disorder) std::shuffle(addresses.begin(), addresses.end(), std::mt19937(7));
    OK(cudaMemcpy(table.take(addresses.size()), addresses.data(), addresses.size() * 8, cudaMemcpyHostToDevice));
}

// Copies the first `count` entries of rows of `pitch` entries of d numbers to rings of `ring`
// entries.
__global__ void to_rings(const __half* x, __half* rings, int pitch, int count, int d, int ring, int shift) {
    for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (i64)count * d; i += (i64)gridDim.x * blockDim.x)
        rings[(blockIdx.y * (i64)ring + (i / d + shift) % ring) * d + i % d] = x[(i64)blockIdx.y * pitch * d + i];
}

// Returns a function that packs rows of `pitch` entries into the records of the table's rows from
// `first` on. The first `in_ring` entries are read from rings.
std::function<void()> quantizer(const Config& c, const __half* k, const __half* v, i64 first, i64 records, int rows, int pitch, int packed_k, int tiles_v,
                                int kind, int in_ring = 0) {
    const int ring = in_ring + 3, shift = 7;
    if (in_ring) {
        i64 n = (i64)rows * ring * c.d;
        to_rings<<<dim3(64, rows), 256>>>(k, ring_k.take(n), pitch, in_ring, c.d, ring, shift), to_rings<<<dim3(64, rows), 256>>>(v, ring_v.take(n), pitch, in_ring, c.d, ring, shift);
    }
    std::vector<FillRow> list(rows);
    std::vector<KvHead> heads(rows);
    for (int r = 0; r < rows; r++) {
        heads[r] = {table.p + (first + r) * records, ring_k.p + (i64)r * ring * c.d, ring_v.p + (i64)r * ring * c.d, nullptr};
        FillRow& row = list[r];
        row = {};
        row.head = r, row.kv_head = r, row.first_token = in_ring, row.first_new = in_ring, row.shift = shift;
        row.first_new_record = INT_MAX, row.key_records = packed_k / c.group, row.value_tiles = tiles_v;
    }
    OK(cudaMemcpy(fill_rows.take(rows), list.data(), rows * sizeof(FillRow), cudaMemcpyHostToDevice));
    OK(cudaMemcpy(fill_heads.take(rows), heads.data(), rows * sizeof(KvHead), cudaMemcpyHostToDevice));
    dim3 grid(std::max(packed_k / c.group * c.k_parts, tiles_v), rows, 2);
    const i64 head = (i64)pitch * c.d;
    FillArgs args{fill_rows.p, fill_heads.p, k, v, nullptr, counters.take(8), c.d, head, c.d, head, ring, kind, c.d / 8, c.rotated, c.f16_steps, c.key_scale, c.value_scale, 0};
    return [=, &c] {
        if (grid.x) c.quantize<<<grid, c.quantize_threads, c.quantize_shared>>>(args);
        OK(cudaGetLastError());
    };
}

// Returns one work item per kv head.
std::vector<Work> heads_of(const Config& c, const Case& s, int packed_len, int residual, int ring, int start, i64 first, i64 records) {
    std::vector<Work> heads(s.batch * s.kv_heads);
    for (int r = 0; r < (int)heads.size(); r++) {
        Work& w = heads[r];
        w = {};
        w.head = (int)new_heads.size();
        new_heads.push_back({table.p + (first + r) * records, ring_k.p + (i64)r * ring * c.d, ring_v.p + (i64)r * ring * c.d, nullptr});
        w.sums = (i64)r * s.per_kv * (packed_len + residual);
        w.packed = packed_len, w.residual = residual, w.ring_start = start, w.queries = s.queries;
        w.kv_head = r % s.kv_heads, w.first_token = r / s.kv_heads * s.queries;
    }
    return heads;
}

// Splits each kv head's records over `splits` blocks; one more block processes its ring.
std::vector<Work> split(const Config& c, const Variant& v, const Case& s, const std::vector<Work>& heads, int splits) {
    std::vector<Work> all;
    int merge = 0;
    for (auto& head : heads)
        for (int column = 0; column < s.per_kv * s.queries; column += 8 * v.n, merge++)
            for (int part = 0; part <= splits; part++) {
                i64 records = (head.packed + c.group - 1) / c.group;
                Work w = head;
                w.first_column = column, w.first_part = merge * (splits + 1), w.part = part, w.parts = splits + 1, w.merge = merge;
                w.from = part < splits ? records * part / splits : -1, w.to = part < splits ? records * (part + 1) / splits : -1;
                all.push_back(w);
            }
    return all;
}

AttendArgs prepare(const Config& c, const Variant& v, const Case& s, int ring, const std::vector<Work>& all) {
    int rows = s.batch * s.kv_heads, columns = s.per_kv * s.queries;
    AttendArgs a{};
    a.q = query.p, a.out = out.take((i64)rows * columns * c.d), a.lse = lse.take(rows * columns);
    i64 parts = (i64)all.size() * 8 * v.n;
    a.part_out = part_out.take(parts * c.d), a.part_lse = part_lse.take(parts);
    a.arrived = arrived.take(all.size());
    OK(cudaMemset(a.arrived, 0, all.size() * 4));
    OK(cudaMemset(a.out, 0xff, (i64)rows * columns * c.d * 2)), OK(cudaMemset(a.lse, 0xff, rows * columns * 4));
    OK(cudaMemset(a.part_out, 0xff, parts * c.d * 4)), OK(cudaMemset(a.part_lse, 0xff, parts * 4));
    a.work = work.take(all.size());
    OK(cudaMemcpy(work.p, all.data(), all.size() * sizeof(Work), cudaMemcpyHostToDevice));
    a.kv_heads = kv_heads.take(new_heads.size());
    OK(cudaMemcpy(kv_heads.p, new_heads.data(), new_heads.size() * sizeof(KvHead), cudaMemcpyHostToDevice));
    new_heads.clear();
    a.heads = s.kv_heads * s.per_kv, a.heads_per_kv = s.per_kv, a.ring = ring;
    a.causal = s.causal, a.window = s.window, a.kind = s.kind, a.out_kind = s.kind;
    a.scale = 1.f / sqrtf(c.d), a.soft_cap = s.soft_cap;
    a.rotated = c.rotated, a.key_scale = c.key_scale, a.value_scale = c.value_scale;
    return a;
}

void launch(const Variant& v, const AttendArgs& a, int blocks, cudaStream_t stream = 0) {
    v.kernel<<<blocks, v.warps * 32, v.shared, stream>>>(a);
    OK(cudaGetLastError());
}

void launch_sums(const Config& c, AttendArgs a, const std::vector<Work>& heads) {
    auto tiles = [](int tokens) { return (tokens + TILE - 1) / TILE; };
    const Work& head = heads[0];
    int warps = tiles(head.packed) + tiles(head.residual), z = head.queries > 1 ? a.heads_per_kv : (a.heads_per_kv + 7) / 8;
    i64 n = (i64)heads.size() * a.heads_per_kv * (head.packed + head.residual);
    static Buffer<Work> on_device;
    a.out = prob_sums.take(n), a.work = on_device.take(heads.size());
    OK(cudaMemcpy(on_device.p, heads.data(), heads.size() * sizeof(Work), cudaMemcpyHostToDevice));
    OK(cudaMemset(a.out, 0xff, n * 4));
    c.sums<<<dim3((warps + SUM_WARPS - 1) / SUM_WARPS, heads.size(), z), SUM_WARPS * 32, c.sums_shared>>>(a);
    OK(cudaGetLastError());
}

// Returns the relative error of the sums compared with the plain probabilities; `scores` is
// [head][query][token].
double check_sums(int heads, int queries, int tokens) {
    std::vector<double> plain((i64)heads * queries * tokens);
    std::vector<float> got((i64)heads * tokens);
    OK(cudaMemcpy(plain.data(), scores.p, plain.size() * 8, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(got.data(), prob_sums.p, got.size() * 4, cudaMemcpyDeviceToHost));
    double diff = 0, norm = 0;
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < tokens; t++) {
            double want = 0;
            for (int q = 0; q < queries; q++) want += plain[((i64)h * queries + q) * tokens + t];
            double off = got[(i64)h * tokens + t] - want;
            diff += off * off, norm += want * want;
        }
    return sqrt(diff / norm);
}

// Returns whether a captured launch, with work lists written after the capture, has the results of
// a direct launch.
bool check_graph(const Variant& v, const AttendArgs& a, const std::vector<Work>& all, i64 outs) {
    std::vector<__half> plain(outs), replayed(outs);
    OK(cudaMemcpy(plain.data(), a.out, outs * 2, cudaMemcpyDeviceToHost));
    OK(cudaMemset(a.out, 0xff, outs * 2)), OK(cudaMemset(work.p, 0, all.size() * sizeof(Work)));
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    OK(cudaStreamCreate(&stream)), OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch(v, a, all.size(), stream);
    OK(cudaStreamEndCapture(stream, &graph)), OK(cudaGraphInstantiate(&ready, graph, 0));
    OK(cudaMemcpy(work.p, all.data(), all.size() * sizeof(Work), cudaMemcpyHostToDevice));
    for (int i = 0; i < 2; i++) OK(cudaGraphLaunch(ready, stream)), OK(cudaStreamSynchronize(stream));
    OK(cudaMemcpy(replayed.data(), a.out, outs * 2, cudaMemcpyDeviceToHost));
    OK(cudaGraphExecDestroy(ready)), OK(cudaGraphDestroy(graph)), OK(cudaStreamDestroy(stream));
    return !memcmp(plain.data(), replayed.data(), outs * 2);
}

double worst_sums = 0, worst_unpacked = 0;

// Returns the relative error |out - ref| / |ref| over all outputs, and prints each fault.
double check(const Config& c, const Variant& v, const Case& s, int splits) {
    int rows = s.batch * s.kv_heads, columns = s.per_kv * s.queries, d = c.d, t = s.tokens;
    i64 n = (i64)rows * t * d;
    fill<<<1024, 256>>>(raw_k.take(n), n, d, 2.f, s.kind, 1000000007ull * t), fill<<<1024, 256>>>(raw_v.take(n), n, d, .3f, s.kind, 77ull * t + (1ull << 40));
    fill<<<64, 256>>>(query.take((i64)rows * columns * d), (i64)rows * columns * d, d, 0.f, s.kind, 5ull << 41);
    int packed_v = std::max(0, t - s.residual), packed_k = packed_v / c.group * c.group;
    if (s.staggered) packed_k = std::min((packed_v + c.group - 1) / c.group * c.group, t / c.group * c.group), packed_v = std::min(packed_v, packed_k);
    else packed_v = packed_k;
    int tiles_v = std::min((packed_v + 31) / 32, t / 32), residual = t - packed_v;
    i64 records = (t + c.group - 1) / c.group;
    scatter(c, rows, records);
    OK(cudaMemset(packed.p, 0, rows * records * c.record)), OK(cudaMemset(counters.take(8), 0, 64));
    quantizer(c, raw_k.p, raw_v.p, 0, records, rows, t, packed_k, tiles_v, s.kind)();
    c.plain(raw_k.p, raw_v.p, ref_k.take(n), ref_v.take(n), rows, t, packed_k, packed_v, s.kind);
    got_k.take(n), got_v.take(n);
    for (int row = 0; row < rows && packed_k; row++) {
        i64 at = (i64)row * t * d;
        c.unpack<<<(packed_k + 7) / 8, 256>>>(UnpackArgs{table.p + row * records, got_k.p + at, got_v.p + at, 0, packed_k, 0, 0, 2, c.rotated, c.key_scale, c.value_scale});
    }
    double* off = (double*)counters.p + 1;
    compare<<<256, 256>>>(got_k.p, ref_k.p, rows, t, packed_k, d, off), compare<<<256, 256>>>(got_v.p, ref_v.p, rows, t, packed_v, d, off + 2);
    for (int row = 0; row < rows && c.limit > 0; row++) {
        i64 at = (i64)row * t * d;
        OK(cudaMemcpy(ref_k.p + at, got_k.p + at, (i64)packed_k * d * 4, cudaMemcpyDeviceToDevice)), OK(cudaMemcpy(ref_v.p + at, got_v.p + at, (i64)packed_v * d * 4, cudaMemcpyDeviceToDevice));
    }
    // The ring's first entry is in the middle of its memory. Keys whose values are not packed yet
    // are also in the ring, in full precision.
    int ring = residual + 5, start = ring * 2 / 3;
    ring_k.take((i64)rows * ring * d), ring_v.take((i64)rows * ring * d);
    OK(cudaMemset(ring_k.p, 0x3c, (i64)rows * ring * d * 2)), OK(cudaMemset(ring_v.p, 0x3c, (i64)rows * ring * d * 2));
    int first = std::min(residual, ring - start);
    for (int part = 0; part < 2; part++) {
        size_t from = packed_v + (part ? first : 0), to = part ? 0 : start, count = part ? residual - first : first, w = d * 2;
        if (!count) continue;
        OK(cudaMemcpy2D((char*)ring_k.p + to * w, ring * w, (char*)raw_k.p + from * w, t * w, count * w, rows, cudaMemcpyDeviceToDevice));
        OK(cudaMemcpy2D((char*)ring_v.p + to * w, ring * w, (char*)raw_v.p + from * w, t * w, count * w, rows, cudaMemcpyDeviceToDevice));
    }
    if (packed_k > packed_v)  // The reference takes these from full precision as well.
        c.plain(raw_k.p, raw_v.p, ref_k.p, ref_v.p, rows, t, packed_k = packed_v / c.group * c.group, packed_v, s.kind);
    auto heads = heads_of(c, s, packed_v, residual, ring, start, 0, records), all = split(c, v, s, heads, splits);
    AttendArgs a = prepare(c, v, s, ring, all);
    // The record that values end in has its keys packed: the reference too.
    if (s.staggered && packed_v % c.group) {
        c.plain(raw_k.p, raw_v.p, got_k.p, got_v.p, rows, t, packed_k + c.group, packed_v, s.kind);
        for (int row = 0; row < rows; row++)
            OK(cudaMemcpy(ref_k.p + ((i64)row * t + packed_k) * d, got_k.p + ((i64)row * t + packed_k) * d, (i64)(packed_v - packed_k) * d * 4, cudaMemcpyDeviceToDevice));
    }
    launch(v, a, all.size());
    launch_sums(c, a, heads);
    i64 outs = (i64)rows * columns * d;
    Plain p{query.p, ref_k.p, ref_v.p, scores.take((i64)rows * columns * t), ref_out.take(outs), ref_lse.take(rows * columns), t, d, columns, s.queries, s.kv_heads, s.causal, s.window, s.kind, a.scale, s.soft_cap};
    OK(cudaMemset(p.out, 0, outs * 8));
    plain_scores<<<dim3((t + 255) / 256, rows, columns), 256>>>(p), plain_softmax<<<rows * columns, 256>>>(p), plain_values<<<dim3((t + 1023) / 1024, rows, columns), d>>>(p);
    OK(cudaDeviceSynchronize());
    std::vector<double> ref(outs), rl(rows * columns);
    std::vector<__half> got(outs);
    std::vector<float> gl(rows * columns);
    unsigned long long bad = 0;
    double unpacked[4];
    OK(cudaMemcpy(ref.data(), ref_out.p, outs * 8, cudaMemcpyDeviceToHost)), OK(cudaMemcpy(got.data(), out.p, outs * 2, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(rl.data(), ref_lse.p, rl.size() * 8, cudaMemcpyDeviceToHost)), OK(cudaMemcpy(gl.data(), lse.p, gl.size() * 4, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(&bad, counters.p, 8, cudaMemcpyDeviceToHost)), OK(cudaMemcpy(unpacked, counters.p + 1, 32, cudaMemcpyDeviceToHost));
    double keys_off = unpacked[0] > 0 ? sqrt(unpacked[0] / unpacked[1]) : 0, values_off = unpacked[2] > 0 ? sqrt(unpacked[2] / unpacked[3]) : 0;
    if (packed_k && !(unpacked[1] > 0)) keys_off = NAN;
    worst_unpacked = std::max({worst_unpacked, keys_off, values_off});
    double diff = 0, norm = 0, lse_off = 0;
    for (int i = 0; i < rows * columns; i++) {
        i64 row = p.row_of(i / columns, i % columns);
        for (int j = 0; j < d; j++) {
            float x;
            if (s.kind) {
                __nv_bfloat16 b;
                memcpy(&b, &got[row * d + j], 2), x = __bfloat162float(b);
            } else x = __half2float(got[row * d + j]);
            double want = ref[(i64)i * d + j];
            diff += (x - want) * (x - want), norm += want * want;
        }
        double l = fabs(gl[row] - rl[i]);
        lse_off = l <= lse_off ? lse_off : l;  // NaN counts as the worst.
    }
    double worst = sqrt(diff / norm), sums = check_sums(rows * s.per_kv, s.queries, t);
    bool graph = check_graph(v, a, all, outs);
    double limit = s.kind ? 6e-3 : 2e-3;
    if (!(worst <= limit) || !(sums <= limit) || !graph || !(lse_off < 4e-3) || bad || !(keys_off <= c.limit) || !(values_off <= c.limit))
        printf("WRONG %s d %d n %d warps %d stages %d: batch %d kv %d x %d tokens %d residual %d queries %d causal %d window %d kind %d cap %g stag %d splits %d: error %.2e, sums %.2e, graph %d, lse %.2e, status %llx, keys %.2e, values %.2e\n",
               c.name.c_str(), c.d, v.n, v.warps, v.stages, s.batch, s.kv_heads, s.per_kv, t, s.residual, s.queries, s.causal, s.window, s.kind, s.soft_cap, s.staggered, splits, worst, sums, graph, lse_off, bad, keys_off, values_off);
    worst_sums = std::max(worst_sums, sums);
    return worst;
}

// The plan of src/cuda/plan.rs for rows of equal length.
int default_splits(const Config& c, const Variant& v, int rows, int z, int records) {
    int per_sm = 0, sms = 0;
    OK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, v.kernel, v.warps * 32, v.shared));
    const int blocks = per_sm * sms, all = rows * z;
    int splits = std::max(1, std::max(blocks - all, blocks * 4 / 5) / all);
    for (int waves : {1, 2}) {
        const int used = all * splits, more = waves * blocks / all;
        const bool idle = waves == 1 ? 2 * used <= blocks : 5 * used < 4 * blocks * ((used + blocks - 1) / blocks);
        if (idle && more > splits && (i64)records * c.group >= 4096ll * waves * more) splits = more;
    }
    splits = std::min(splits, (records + v.warps - 1) / v.warps);
    return std::max(1, std::min(MAX_SPLITS, splits));
}

double median_ms(int count, const std::function<void(int)>& f) {
    std::vector<cudaEvent_t> events(2 * count);
    for (auto& e : events) OK(cudaEventCreate(&e));
    for (int i = 0; i < 5; i++) f(i);
    for (int i = 0; i < count; i++) OK(cudaEventRecord(events[2 * i])), f(i), OK(cudaEventRecord(events[2 * i + 1]));
    OK(cudaDeviceSynchronize());
    std::vector<float> times(count);
    for (int i = 0; i < count; i++) OK(cudaEventElapsedTime(&times[i], events[2 * i], events[2 * i + 1]));
    for (auto& e : events) OK(cudaEventDestroy(e));
    std::sort(times.begin(), times.end());
    return times[count / 2];
}

double copy_bandwidth() {
    size_t n = 4ull << 30;
    char *a, *b;
    OK(cudaMalloc(&a, n)), OK(cudaMalloc(&b, n)), OK(cudaMemset(a, 1, n));
    double ms = median_ms(20, [&](int) { OK(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice)); });
    OK(cudaFree(a)), OK(cudaFree(b));
    return 2. * n / ms * 1e-6;
}

double copy_gbs;

__global__ void empty() {}

// Batches of a server's sequences: their number and tokens.
const std::pair<int, int> BATCHES[] = {{64, 2048}, {96, 4096}, {16, 16384}, {32, 16384}, {8, 32768}};

void time_attend(const Config& c, const Variant& v, int batch, int kv, int per, int t) {
    Case s{batch, kv, per, t, 128, 1, 1, 0, 0, 0.f, false};
    int rows = batch * kv, packed_len = t - 128;
    i64 records = packed_len / c.group, bytes = rows * records * c.record;
    int copies = int(std::max<i64>(2, (200ll << 20) / bytes + 1));
    i64 n = (i64)rows * packed_len * c.d, have = std::min(n, (i64)1 << 28);
    fill<<<4096, 256>>>(raw_k.take(have), have, c.d, 2.f, 0, 1), fill<<<4096, 256>>>(raw_v.take(have), have, c.d, .3f, 0, 2);
    scatter(c, (i64)rows * copies, records);
    // All rows are filled from the same numbers.
    i64 rows_at_once = std::max<i64>(1, have / ((i64)packed_len * c.d));
    for (i64 r = 0; r < rows * copies; r += rows_at_once)
        quantizer(c, raw_k.p, raw_v.p, r, records, (int)std::min(rows_at_once, rows * copies - r), packed_len, packed_len, packed_len / 32, 0)();
    i64 ring = (i64)rows * 128 * c.d;
    fill<<<1024, 256>>>(query.take((i64)rows * per * c.d), (i64)rows * per * c.d, c.d, 0.f, 0, 3);
    fill<<<1024, 256>>>(ring_k.take(ring), ring, c.d, 2.f, 0, 4), fill<<<1024, 256>>>(ring_v.take(ring), ring, c.d, .3f, 0, 5);
    int z = (per + 8 * v.n - 1) / (8 * v.n), splits = default_splits(c, v, rows, z, packed_len / c.group), per_sm = 0;
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, v.kernel, v.warps * 32, v.shared));
    std::vector<Work> all;
    for (int copy = 0; copy < copies; copy++)
        for (auto& w : split(c, v, s, heads_of(c, s, packed_len, 128, 128, 0, (i64)copy * rows, records), splits)) all.push_back(w);
    AttendArgs a = prepare(c, v, s, 128, all);
    int blocks = int(all.size()) / copies;
    double ms = median_ms(60, [&](int i) {
        a.work = work.p + i % copies * blocks;
        launch(v, a, blocks);
    });
    double gbs = (bytes + ring * 4.) / ms * 1e-6;
    printf("attend %-12s g%d d%d batch %d heads %2d/%2d tokens %6d | warps %d stages %d shared %6d blocks/sm %d splits %3d | %8.4f ms %6.0f GB/s %5.1f%%\n", c.name.c_str(), c.group, c.d,
           batch, kv * per, kv, t, v.warps, v.stages, v.shared, per_sm, splits, ms, gbs, 100 * gbs / copy_gbs);
}

void time_quantize(const Config& c, int rows, int t, int kind) {
    i64 n = (i64)rows * t * c.d, records = t / c.group;
    fill<<<4096, 256>>>(raw_k.take(n), n, c.d, 2.f, kind, 1), fill<<<4096, 256>>>(raw_v.take(n), n, c.d, .3f, kind, 2);
    scatter(c, rows, records);
    auto pack = quantizer(c, raw_k.p, raw_v.p, 0, records, rows, t, t, t / 32, kind);
    double ms = median_ms(50, [&](int) { pack(); });
    double gbs = (n * 4. + rows * records * c.record) / ms * 1e-6;
    printf("quantize %-12s g%d d%d rows %d tokens %d kind %d | %8.4f ms %6.0f GB/s %5.1f%%\n", c.name.c_str(), c.group, c.d, rows, t, kind, ms, gbs, 100 * gbs / copy_gbs);
}

// Checks packing alone: compares unpacked numbers with the plain quantizer's. Prints a hash of all
// records, by which two versions of the kernels can be compared.
void check_packing(const std::vector<Config>& all, bool small) {
    for (auto& c : all) {
        double worst = 0;
        unsigned long long hash = 14695981039346656037ull;
        std::vector<unsigned char> bytes;
        for (int t : small ? std::vector<int>{300} : std::vector<int>{128, 300, 4096, 20000})
            for (int kind = 0; kind < 2; kind++)
                for (int in_ring : {0, t / 3}) {
                    const int rows = 3, d = c.d, packed_len = t / c.group * c.group;
                    const i64 n = (i64)rows * t * d, records = t / c.group;
                    fill<<<1024, 256>>>(raw_k.take(n), n, d, 2.f, kind, 1000000007ull * t), fill<<<1024, 256>>>(raw_v.take(n), n, d, .3f, kind, 77ull * t + (1ull << 40));
                    scatter(c, rows, records);
                    OK(cudaMemset(packed.p, 0xa5, rows * records * c.record)), OK(cudaMemset(counters.take(8), 0, 64));
                    quantizer(c, raw_k.p, raw_v.p, 0, records, rows, t, packed_len, packed_len / 32, kind, in_ring)();
                    c.plain(raw_k.p, raw_v.p, ref_k.take(n), ref_v.take(n), rows, t, packed_len, packed_len, kind);
                    got_k.take(n), got_v.take(n);
                    for (int row = 0; row < rows; row++) {
                        i64 at = (i64)row * t * d;
                        c.unpack<<<(packed_len + 7) / 8, 256>>>(UnpackArgs{table.p + row * records, got_k.p + at, got_v.p + at, 0, packed_len, 0, 0, 2, c.rotated, c.key_scale, c.value_scale});
                    }
                    double* off = (double*)counters.p + 1;
                    compare<<<256, 256>>>(got_k.p, ref_k.p, rows, t, packed_len, d, off), compare<<<256, 256>>>(got_v.p, ref_v.p, rows, t, packed_len, d, off + 2);
                    unsigned long long bad = 0;
                    double sums[4];
                    OK(cudaMemcpy(&bad, counters.p, 8, cudaMemcpyDeviceToHost)), OK(cudaMemcpy(sums, counters.p + 1, 32, cudaMemcpyDeviceToHost));
                    // NaN if nothing was written
                    double keys = sqrt(sums[0] / sums[1]), values = sqrt(sums[2] / sums[3]);
                    if (bad || !(keys <= c.limit) || !(values <= c.limit))
                        printf("WRONG %s d %d: tokens %d kind %d in ring %d: status %llx, keys %.2e, values %.2e\n", c.name.c_str(), d, t, kind, in_ring, bad, keys, values);
                    worst = std::max({worst, keys, values});
                    bytes.resize(rows * records * c.record);
                    OK(cudaMemcpy(bytes.data(), packed.p, bytes.size(), cudaMemcpyDeviceToHost));
                    for (unsigned char b : bytes) hash = (hash ^ b) * 1099511628211ull;
                }
        printf("packing %-12s group %3d d %3d: worst difference %.2e, hash %016llx\n", c.name.c_str(), c.group, c.d, worst, hash);
    }
}

// Checks all kernels in many shapes; `small`: only short ones.
void check_all(const std::vector<Config>& all, bool small, bool staggers) {
    std::vector<int> lengths = {1, 31, 32, 33, 127, 300};
    if (!small) for (int t : {4096, 32768, 131072}) lengths.push_back(t);
    int cases = 0;
    for (auto& c : all) {
        double worst[2] = {}, blocked = 0;
        for (auto& v : c.attend) {
            if (!v.fits()) continue;
            for (int t : lengths)
                for (auto [kv, per] : {std::pair{4, 1}, {2, 4}, {1, 8}, {1, 16}}) {
                    if ((t > 40000 || small) && per != 4) continue;
                    for (int kind = 0; kind < 2; kind++) {
                        if (small && kind) continue;
                        Case s{t > 40000 || small ? 1 : 2, kv, per, t, per == 4 ? 33 : 0, 1, 1, 0, kind, 0.f, staggers && per == 8};
                        int z = (per + 8 * v.n - 1) / (8 * v.n);
                        int splits = per == 1 ? 1 : default_splits(c, v, s.batch * kv, z, t / c.group + 1);
                        worst[kind] = std::max(worst[kind], check(c, v, s, splits)), cases++;
                    }
                    if (t < 40 || small || t > 5000) continue;
                    Case block{1, kv, per, t, 40, 17, 1, t / 2, 0, 0.f, staggers}, capped{1, kv, per, t, 32, 5, 0, 0, 0, 3.f, false};
                    blocked = std::max({blocked, check(c, v, block, 3), check(c, v, capped, 2)}), cases += 2;
                }
        }
        printf("%-12s group %3d d %3d: worst error f16 %.2e, bf16 %.2e, query blocks %.2e, sums %.2e, unpacked %.2e\n", c.name.c_str(), c.group, c.d, worst[0], worst[1], blocked, worst_sums, worst_unpacked);
        worst_sums = worst_unpacked = 0;
    }
    printf("%d cases\n", cases);
}

// Times the eviction of one entry of each kv head, after a decoded token of each sequence: 32 layers of
// Llama-3-8B's shape in one launch. Needs only CUDA.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I crates/kernels -o evict benches/gpu/evict.cu
//     ./evict
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/paged.cu"

void ok(int error, int line) {
    if (error == 0) return;
    printf("line %d: error %d\n", line, error);
    exit(1);
}
#define OK(call) ok(call, __LINE__)

__global__ void fill(float* x, size_t n) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        uint32_t h = uint32_t(i) * 2654435761u;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = float(h & 0xffff) / 8192.f - 4.f;
    }
}

template <class T>
T* copied(const std::vector<T>& x) {
    T* to;
    OK(cudaMalloc(&to, x.size() * sizeof(T)));
    OK(cudaMemcpy(to, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
}

constexpr int LAYERS = EVICT_LAYERS, HEADS = 32, KV_HEADS = 8, D = 128;

// Microseconds of a launch, the median of many. `layer`: all query heads are reduced, as by TOVA;
// otherwise the scores are carried, as by H2O.
double launch_us(int seqs, int len, bool layer) {
    const size_t pages = (len + PAGE - 1) / PAGE, block = size_t(2) * PAGE * D * 2, rows = size_t(LAYERS) * seqs * KV_HEADS;
    const int row = (len + 63) / 64 * 64;
    unsigned char* blocks;
    float *scores, *previous, *kept_scores;
    uint32_t* kept;
    OK(cudaMalloc(&blocks, rows * pages * block));
    OK(cudaMalloc(&scores, sizeof(float) * size_t(LAYERS) * seqs * HEADS * row)), OK(cudaMalloc(&previous, sizeof(float) * rows * len));
    OK(cudaMalloc(&kept_scores, sizeof(float) * rows * len)), OK(cudaMalloc(&kept, sizeof(uint32_t) * rows * len));
    fill<<<1024, 256>>>(scores, size_t(LAYERS) * seqs * HEADS * row), fill<<<1024, 256>>>(previous, rows * len);
    std::vector<uint64_t> table(rows * pages);
    for (size_t i = 0; i < table.size(); i++) table[i] = uint64_t(blocks) + i * block;
    const uint64_t* entries = copied(table);
    std::vector<const uint64_t*> tables(rows);
    for (size_t i = 0; i < rows; i++) tables[i] = entries + i * pages;
    const uint64_t** heads = copied(tables);
    std::vector<uint32_t> numbers(len);
    for (int i = 0; i < len; i++) numbers[i] = i;
    const uint32_t* positions = copied(numbers);
    const float* lse = copied(std::vector<float>(size_t(seqs) * HEADS, 8.f));
    EvictLayers args = {};
    for (int l = 0; l < LAYERS; l++) {
        std::vector<EvictRow> list;
        for (int i = 0; i < seqs * KV_HEADS; i++) {
            const size_t at = (size_t(l) * seqs * KV_HEADS + i) * len;
            EvictRow of = {};
            of.positions = positions, of.kept_positions = kept + at, of.table = i, of.kv_head = i % KV_HEADS, of.token = i / KV_HEADS;
            of.len = len, of.placed = len - 1, of.next = len - 1, of.recent = layer ? 1 : len / 2, of.layer = layer;
            if (!layer) of.previous = previous + at, of.kept_scores = kept_scores + at, of.scored = len - 1;
            list.push_back(of);
        }
        EvictArgs& a = args.layers[l];
        a.scores = scores + size_t(l) * seqs * HEADS * row, a.lse = lse, a.rows = copied(list), a.tables = heads + size_t(l) * seqs * KV_HEADS;
        a.heads = HEADS, a.heads_per_kv = HEADS / KV_HEADS, a.scores_row = row, a.pieces = D / 8, a.count = seqs * KV_HEADS;
    }
#ifdef EVICT_CLUSTER
    const dim3 grid(EVICT_BLOCKS * seqs * KV_HEADS, LAYERS);
#else
    const dim3 grid(seqs * KV_HEADS, LAYERS);
#endif
    constexpr int COUNT = 31;
    cudaEvent_t events[COUNT + 1];
    for (auto& e : events) OK(cudaEventCreate(&e));
    for (int i = 0; i <= COUNT; i++) {
        OK(cudaEventRecord(events[i]));
        if (i < COUNT) paged_evict<<<grid, EVICT_THREADS>>>(args);
    }
    OK(cudaDeviceSynchronize());
    float times[COUNT];
    for (int i = 0; i < COUNT; i++) OK(cudaEventElapsedTime(&times[i], events[i], events[i + 1]));
    std::sort(times, times + COUNT);
    for (const void* p : {(const void*)blocks, (const void*)scores, (const void*)previous, (const void*)kept_scores, (const void*)kept, (const void*)entries, (const void*)heads, (const void*)positions, (const void*)lse}) OK(cudaFree((void*)p));
    for (auto& a : args.layers) OK(cudaFree((void*)a.rows));
    return 1e3 * times[COUNT / 2];
}

int main() {
    for (auto [seqs, len] : {std::pair{1, 2049}, std::pair{1, 8193}, std::pair{8, 2049}, std::pair{16, 4097}})
        printf("%d x %d entries: H2O %.1f us, TOVA %.1f us\n", seqs, len, launch_us(seqs, len, false), launch_us(seqs, len, true));
}

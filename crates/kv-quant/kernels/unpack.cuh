// Reads packed records back by the layout's own account of where things lie. For policies and tests: attention never does this.
#pragma once
#include <cuda_fp16.h>
#include "layout.cuh"

namespace kvq {

// Mirrored by `UnpackArgs` in src/cuda/args.rs.
struct UnpackArgs {
    const unsigned long long* table;  // a kv head's records
    float* k;                         // [entries, D]
    float* v;
    int first, entries;  // the first entry to read, and how many
};

static_assert(sizeof(UnpackArgs) == 32, "as in src/cuda/args.rs");

// One number of k and of v for each thread, in blocks of one dimension.
template <int BITS, int GROUP, int D>
__device__ __forceinline__ void unpack(const UnpackArgs& args) {
    using L = Layout<BITS, GROUP, D>;
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= (long long)args.entries * D) return;
    int c = i % D, t = args.first + i / D;
    const unsigned char* record = reinterpret_cast<const unsigned char*>(args.table[t / GROUP]);
    const unsigned char* tile = record + L::HEADER + t % GROUP / TILE * L::TILE_BYTES;
    auto half_at = [](const unsigned char* p, int i) { return __half2float(reinterpret_cast<const __half*>(p)[i]); };
    auto code = [](const unsigned char* codes, typename L::Place p) {
        return float(*reinterpret_cast<const uint32_t*>(codes + p.byte) >> p.shift & ((1 << BITS) - 1));
    };
    int at = L::key_param_at(c);
    args.k[i] = fmaf(code(tile + L::K_CODES, L::key_at(t % TILE, c)), half_at(record + L::K_SCALE, at), half_at(record + L::K_MIN, at));
    at = L::value_param_at(t % TILE, c / L::VGROUP);
    args.v[i] = fmaf(code(tile + L::V_CODES, L::value_at(t % TILE, c)), half_at(tile + L::V_SCALE, at), half_at(tile + L::V_MIN, at));
}

}  // namespace kvq

// Reads packed records back by the layout's own account of where things lie. For policies and tests: attention never does this.
#pragma once
#include <cuda_fp16.h>
#include "layout.cuh"

namespace kvq {

// Mirrored by `UnpackArgs` in src/cuda/args.rs.
struct UnpackArgs {
    const unsigned char* packed;  // rows of records, each `packed_stride` bytes
    float* k;                     // [rows, tokens, D]
    float* v;
    long long packed_stride;
    int rows, tokens;
    int keys;    // tokens whose keys are packed; the others are left alone
    int values;  // the same for values
};

// One number of k and of v for each thread, in blocks of one dimension.
template <int BITS, int GROUP, int D>
__device__ __forceinline__ void unpack(const UnpackArgs& args) {
    using L = Layout<BITS, GROUP, D>;
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x, row = i / D / args.tokens;
    if (row >= args.rows) return;
    int c = i % D, t = i / D % args.tokens;
    const unsigned char* record = args.packed + row * args.packed_stride + (long long)(t / GROUP) * L::RECORD;
    const unsigned char* tile = record + L::HEADER + t % GROUP / TILE * L::TILE_BYTES;
    auto half_at = [](const unsigned char* p, int i) { return __half2float(reinterpret_cast<const __half*>(p)[i]); };
    auto code = [](const unsigned char* codes, typename L::Place p) {
        return float(*reinterpret_cast<const uint32_t*>(codes + p.byte) >> p.shift & ((1 << BITS) - 1));
    };
    if (t < args.keys) {
        int at = L::key_param_at(c);
        args.k[i] = fmaf(code(tile + L::K_CODES, L::key_at(t % TILE, c)), half_at(record + L::K_SCALE, at), half_at(record + L::K_MIN, at));
    }
    if (t < args.values) {
        int at = L::value_param_at(t % TILE, c / L::VGROUP);
        args.v[i] = fmaf(code(tile + L::V_CODES, L::value_at(t % TILE, c)), half_at(tile + L::V_SCALE, at), half_at(tile + L::V_MIN, at));
    }
}

}  // namespace kvq

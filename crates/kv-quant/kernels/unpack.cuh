// Reads packed records back by the layout's own account of where things lie: for policies, tests, and records that are cut. Attention never does this.
#pragma once
#include "args.cuh"
#include "layout.cuh"

namespace kvq {

// Mirrored by `UnpackArgs` in src/cuda/args.rs.
struct UnpackArgs {
    const unsigned long long* table;  // a kv head's records
    void* k;                          // [entries, D], or a ring of `ring` entries of which entry e lies at place (e + shift) % ring
    void* v;
    int first, entries;  // the first entry to read, and how many
    int ring, shift;     // 0 places: k and v are no rings
    int kind;            // of k and v: 0 f16, 1 bf16, 2 f32
    int unused;
};

static_assert(sizeof(UnpackArgs) == 48 && offsetof(UnpackArgs, first) == 24, "as in src/cuda/args.rs");

// One number of k and of v for each thread, in blocks of one dimension.
template <int BITS, int GROUP, int D>
__device__ __forceinline__ void unpack(const UnpackArgs& args) {
    using L = Layout<BITS, GROUP, D>;
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= (long long)args.entries * D) return;
    int c = i % D, t = args.first + i / D;
    long long to = args.ring ? (long long)((t + args.shift) % args.ring) * D + c : i;
    const unsigned char* record = reinterpret_cast<const unsigned char*>(args.table[t / GROUP]);
    const unsigned char* tile = record + L::HEADER + t % GROUP / TILE * L::TILE_BYTES;
    auto half_at = [](const unsigned char* p, int i) { return __half2float(reinterpret_cast<const __half*>(p)[i]); };
    auto code = [](const unsigned char* codes, typename L::Place p) {
        return float(*reinterpret_cast<const uint32_t*>(codes + p.byte) >> p.shift & ((1 << BITS) - 1));
    };
    int at = L::key_param_at(c);
    store(args.k, to, args.kind, fmaf(code(tile + L::K_CODES, L::key_at(t % TILE, c)), half_at(record + L::K_SCALE, at), half_at(record + L::K_MIN, at)));
    at = L::value_param_at(t % TILE, c / L::VGROUP);
    store(args.v, to, args.kind, fmaf(code(tile + L::V_CODES, L::value_at(t % TILE, c)), half_at(tile + L::V_SCALE, at), half_at(tile + L::V_MIN, at)));
}

}  // namespace kvq

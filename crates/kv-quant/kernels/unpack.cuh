// Unpacks records with the layout's index functions, for policies, tests and records that a
// truncation divides. Attention does not use it.
#pragma once
#include "args.cuh"
#include "hadamard.cuh"
#include "layout.cuh"
#include "levels.cuh"

namespace kvq {

// Mirrored by `UnpackArgs` in src/cuda/args.rs.
struct UnpackArgs {
    const unsigned long long* table;  // record addresses of a kv head
    // [entries, D], or a ring [ring, D] with entry e at position (e + shift) % ring
    void* k;
    void* v;
    int first, entries;  // first entry to read, and their number
    int ring, shift;     // ring = 0: k and v are not rings
    int kind;            // dtype of k and v: 0 f16, 1 bf16, 2 f32
    // bit 0: packed keys are rotated, bit 1: packed values are; the output is not rotated
    int rotated;
    float key_scale, value_scale;  // the scales of schemes without stored scales
};

static_assert(sizeof(UnpackArgs) == 56 && offsetof(UnpackArgs, first) == 24, "as in src/cuda/args.rs");

constexpr int UNPACK_THREADS = 256;

// Returns the number that a code represents.
template <class S>
__device__ __forceinline__ float number_of(uint32_t code, float scale, float min) {
    constexpr float DOWN = 1.f / (1 << S::UP);
    if constexpr (S::CODES == Codes::LEVELS) return level<S::BITS>(code) * scale;
    else if constexpr (S::CODES == Codes::SIGNED) return (float(code) - (1 << (S::BITS - 1))) * scale;
    else if constexpr (S::CODES == Codes::E5M2) return __half2float(__ushort_as_half(code << 8)) * (scale * DOWN);
    else if constexpr (S::CODES == Codes::E4M3) return __half2float(__ushort_as_half((code & 0x80) << 8 | (code & 0x7f) << 7)) * (256.f * DOWN * scale);
    else return fmaf(float(code), scale, min);
}

// One entry per warp, in one-dimensional thread blocks.
template <class L>
__device__ __forceinline__ void unpack(const UnpackArgs& args) {
    constexpr int D = L::D;
    const int entry = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (entry >= args.entries) return;
    const int t = args.first + entry, token = t % TILE;
    const long long to = (long long)(args.ring ? (t + args.shift) % args.ring : entry) * D;
    const unsigned char* record = reinterpret_cast<const unsigned char*>(args.table[t / L::GROUP]);
    const unsigned char* tile = record + L::HEADER + t % L::GROUP / TILE * L::TILE_BYTES;
    auto half_at = [](const unsigned char* p, int i) { return __half2float(reinterpret_cast<const __half*>(p)[i]); };
    float k[D / 32], v[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        const int c = 32 * i + lane;
        float scale = args.key_scale, min = 0.f;
        if (L::K_BY_CHANNEL) scale = half_at(record + L::K_SCALE, L::key_param_at(c)), min = half_at(record + L::K_MIN, L::key_param_at(c));
        else if (L::K_BY_TOKEN) scale = half_at(tile + L::KT_SCALE, L::key_token_at(token));
        if (L::K_TOKEN_MIN) min = half_at(tile + L::KT_MIN, L::key_token_at(token));
        k[i] = number_of<typename L::Keys>(L::key_code(tile, token, c), scale, min);
        if (L::Keys::PARAMS == Params::BALANCED) k[i] *= half_at(tile + L::KT_SCALE, L::key_token_at(token));
        scale = args.value_scale, min = 0.f;
        if (L::V_BY_TOKEN) scale = half_at(tile + L::V_SCALE, L::value_param_at(token, c / L::VGROUP));
        if (L::V_TOKEN_MIN) min = half_at(tile + L::V_MIN, L::value_param_at(token, c / L::VGROUP));
        v[i] = number_of<typename L::Values>(L::value_code(tile, token, c), scale, min);
        if (L::V_FACTORS) v[i] *= half_at(record + L::V_FACTOR, L::factor_at(c));
    }
    if (args.rotated & ROTATED_KEYS) hadamard<D>(k, lane);
    if (args.rotated & ROTATED_VALUES) hadamard<D>(v, lane);
#pragma unroll
    for (int i = 0; i < D / 32; i++) store(args.k, to + 32 * i + lane, args.kind, k[i]), store(args.v, to + 32 * i + lane, args.kind, v[i]);
}

}  // namespace kvq

// Copies tokens between rings and plain rows.
#pragma once
#include <stdint.h>

namespace kvq {

// Mirrored by `MoveArgs` in src/cuda/args.rs.
struct MoveArgs {
    const uint4* from_k;  // rows of `from_pitch` tokens
    const uint4* from_v;
    uint4* to_k;
    uint4* to_v;
    long long from_pitch, to_pitch;
    int from_start, from_ring;  // the first token's place, and the places after which the first follows
    int to_start, to_ring;
    int pieces;  // of 16 bytes, in a token
};

// Grid: (tokens, rows, 2); `pieces` threads.
__device__ __forceinline__ void move_tokens(const MoveArgs& args) {
    int from = args.from_start + blockIdx.x, to = args.to_start + blockIdx.x;
    if (from >= args.from_ring) from -= args.from_ring;
    if (to >= args.to_ring) to -= args.to_ring;
    const uint4* x = blockIdx.z ? args.from_v : args.from_k;
    uint4* y = blockIdx.z ? args.to_v : args.to_k;
    y[(blockIdx.y * args.to_pitch + to) * args.pieces + threadIdx.x] = x[(blockIdx.y * args.from_pitch + from) * args.pieces + threadIdx.x];
}

}  // namespace kvq

// The rotary position embedding: channel i of a head is paired with channel i + rotary / 2.
//
// A thread block rotates heads of one token, in up to two tensors: queries and keys. Angles are
// computed in f64 and reduced to one turn. Their sines and cosines are computed in f32.
#include <cstddef>
#include <cstdint>
#include <dependent.cuh>
#include "half.cuh"

// Addresses are device addresses; strides count elements. All heads begin at multiples of 16 bytes.
struct RopeTensor {
    uint64_t x;    // [tokens, heads, head_dim], f16 or bf16
    uint64_t out;  // Shape of x, contiguous
    int64_t token, head;  // Strides of x
    int64_t heads;        // 0: no tensor
};

struct RopeArgs {
    RopeTensor tensors[2];
    uint64_t positions;    // [tokens], i64
    uint64_t frequencies;  // [rotary / 2], f64: radians per position
    int32_t tokens, head_dim;
    int32_t rotary;  // Channels that rotate: a multiple of 16, at most 2 * MAX_PAIRS
    int32_t unused;
};
static_assert(sizeof(RopeTensor) == 40 && sizeof(RopeArgs) == 112 && offsetof(RopeArgs, tokens) == 96, "as in src/rope.rs");

constexpr int THREADS = 256, MAX_PAIRS = 128;

// Rotates eight channels of the first half, `a`, with those of the second half, `b`.
template <class Pair>
__device__ __forceinline__ void turn(uint4& a, uint4& b, const float2* by) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Pair &pair_a = reinterpret_cast<Pair*>(&a)[j], &pair_b = reinterpret_cast<Pair*>(&b)[j];
        const float2 x = widen(pair_a), y = widen(pair_b), s = by[2 * j], t = by[2 * j + 1];
        narrow(pair_a, make_float2(x.x * s.x - y.x * s.y, x.y * t.x - y.y * t.y));
        narrow(pair_b, make_float2(y.x * s.x + x.x * s.y, y.y * t.x + x.y * t.y));
    }
}

// A thread's channels: eight of the first half of the rotated ones and their partners, or eight that
// do not rotate.
struct Piece {
    const uint4* x = nullptr;  // Null: none.
    uint4* y;
    int first, second;  // Indices of the pieces in the head. Equal if they do not rotate.

    // `i`: index among the pieces of all heads of a token. A head's rotated pieces precede the others.
    __device__ __forceinline__ Piece(const RopeArgs& a, int64_t token, int i) {
        const int turning = a.rotary / 16, pieces = turning + (a.head_dim - a.rotary) / 8;
        const int first_heads = a.tensors[0].heads, heads = first_heads + a.tensors[1].heads;
        if (i >= heads * pieces) return;
        const int of_all = i / pieces, piece = i % pieces;
        // Selecting fields instead of a struct keeps the arguments out of local memory.
        const RopeTensor &q = a.tensors[0], &k = a.tensors[1];
        const bool of_k = of_all >= first_heads;
        const int head = of_k ? of_all - first_heads : of_all;
        x = reinterpret_cast<const uint4*>(of_k ? k.x : q.x) + (token * (of_k ? k.token : q.token) + head * (of_k ? k.head : q.head)) / 8;
        y = reinterpret_cast<uint4*>(of_k ? k.out : q.out) + (token * (of_k ? k.heads : q.heads) + head) * (a.head_dim / 8);
        first = piece < turning ? piece : piece + turning, second = piece + turning;
    }
};

// Grid: (tokens, pieces of all heads / THREADS, rounded up).
template <class Pair>
__device__ __forceinline__ void rope(const RopeArgs& a) {
    constexpr double PI = 3.141592653589793;
    __shared__ float2 cos_sin[MAX_PAIRS];
    const int64_t token = blockIdx.x;
    const Piece piece(a, token, blockIdx.y * THREADS + threadIdx.x);
    uint4 first, second;
    wait_for_previous_kernel();
    start_next_kernel();
    if (piece.x) first = piece.x[piece.first], second = piece.x[piece.second];
    const double position = reinterpret_cast<const int64_t*>(a.positions)[token];
    for (int i = threadIdx.x; i < a.rotary / 2; i += THREADS) {
        const double half_turns = position * reinterpret_cast<const double*>(a.frequencies)[i] * (1 / PI);
        float s, c;
        sincospif(float(half_turns - 2 * rint(half_turns / 2)), &s, &c);
        cos_sin[i] = make_float2(c, s);
    }
    __syncthreads();
    if (!piece.x) return;
    if (piece.first < piece.second) {
        turn<Pair>(first, second, cos_sin + 8 * piece.first);
        piece.y[piece.second] = second;
    }
    piece.y[piece.first] = first;
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_f16(const RopeArgs a) { rope<__half2>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_bf16(const RopeArgs a) { rope<__nv_bfloat162>(a); }

// The rotary position embedding: channel i of a head is paired with channel i + rotary / 2.
//
// A thread block rotates all heads of one token, in up to two tensors: queries and keys. Angles are computed in f64 and reduced to one
// turn; their sines and cosines are computed in f32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstddef>
#include <cstdint>

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

__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ void narrow(__half2& y, float2 x) { y = __float22half2_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat162& y, float2 x) { y = __float22bfloat162_rn(x); }

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

template <class Pair>
__device__ __forceinline__ void rope(const RopeArgs& a) {
    constexpr double TWO_PI = 6.283185307179586;
    __shared__ float2 cos_sin[MAX_PAIRS];
    const int64_t token = blockIdx.x;
    const double position = reinterpret_cast<const int64_t*>(a.positions)[token];
    const int pairs = a.rotary / 2;
    for (int i = threadIdx.x; i < pairs; i += THREADS) {
        const double angle = position * reinterpret_cast<const double*>(a.frequencies)[i];
        float s, c;
        sincosf(float(angle - rint(angle / TWO_PI) * TWO_PI), &s, &c);
        cos_sin[i] = make_float2(c, s);
    }
    __syncthreads();
    // A head's pieces of 8 channels: rotated ones, each with its partner, then the others.
    const int turning = pairs / 8, pieces = turning + (a.head_dim - a.rotary) / 8;
    const int first_heads = a.tensors[0].heads, heads = first_heads + a.tensors[1].heads;
    for (int i = threadIdx.x; i < heads * pieces; i += THREADS) {
        const int of_all = i / pieces, piece = i % pieces;
        const RopeTensor& of = a.tensors[of_all >= first_heads];
        const int head = of_all >= first_heads ? of_all - first_heads : of_all;
        const uint4* x = reinterpret_cast<const uint4*>(of.x) + (token * of.token + head * of.head) / 8;
        uint4* y = reinterpret_cast<uint4*>(of.out) + (token * of.heads + head) * (a.head_dim / 8);
        if (piece >= turning) {
            y[piece + turning] = x[piece + turning];
            continue;
        }
        uint4 first = x[piece], second = x[piece + turning];
        turn<Pair>(first, second, cos_sin + 8 * piece);
        y[piece] = first;
        y[piece + turning] = second;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_f16(const RopeArgs a) { rope<__half2>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_bf16(const RopeArgs a) { rope<__nv_bfloat162>(a); }

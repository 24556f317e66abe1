// RWKV-7's recurrence (Peng and others, arXiv 2503.14456) for prompts, in chunks of 16 tokens with
// matrix products.
//
// For a head, let c(t) be the removal key, b(t) the added key, S the state [keys][values] before
// the chunk, W(t) the product of the chunk's decays up to token t, and M = W(7). With the rows
//
//     R(t) = r(t) o W(t) / M,   C(t) = c(t) o W(t - 1) / M,
//     K(s) = k(s) o M / W(s),   B(s) = b(s) o M / W(s),
//
// the values read by the removal keys, u(t) = -c(t)' S(t - 1), are the solution of a triangular
// system. All else is products:
//
//     U = -(I + C B')^-1 (C M S + (C K') V)   with C B' and C K' for s < t only
//     Y = R M S + (R K') V + (R B') U         for s <= t
//     S <- W(15) / M o (M S + K' V + B' U).
//
// RWKV-7 keeps at least e^-e^(-1/2) = 0.545 of a number at each token. So W(t) / M is between 2^-7
// and 2^7, and all rows fit f16, also for bf16 inputs.
//
// A block processes VALUES of a head's values through all tokens. Producers, warps with every
// PRODUCERS-th chunk each, compute the rows, their products and the inverse. Consumers compute the
// last three lines of all chunks in order, each with 16 columns of S in f32 registers. A block
// waits for its consumers (40 products per chunk, in sequence), so more producers than they need
// would only take their issue slots.
#pragma once
#include "wkv7_producer.cuh"
#include "wkv7_consumer.cuh"

namespace hybrid {

template <class T, int VALUES>
__device__ void wkv7_of_values(const Wkv7& p) {
    extern __shared__ __align__(16) char memory[];
    Wkv7Shared<T, VALUES>& shared = *(Wkv7Shared<T, VALUES>*)memory;
    typedef Wkv7Shared<T, VALUES> Shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) shared.weights.fill(p, lane);
    if (threadIdx.x < Shared::PRODUCERS) set_barrier(&shared.full[threadIdx.x], 1), set_barrier(&shared.empty[threadIdx.x], Shared::CONSUMERS);
    __syncthreads();
    if (warp < Shared::PRODUCERS) {
        Wkv7Producer<T, VALUES> producer(p, shared, warp);
        producer.produce_all();
    } else if (warp < Shared::PRODUCERS + Shared::CONSUMERS) {
        Wkv7Consumer<T, VALUES> consumer(p, shared, warp - Shared::PRODUCERS);
        consumer.consume_all();
    }
}

// Grid (2: half a head's values per block, or 1: all; heads; batch), WKV7_THREADS threads, dynamic
// shared memory as in args.cuh.
template <class T>
__device__ void wkv7_chunks(const Wkv7& p) {
    gridDim.x == 1 ? wkv7_of_values<T, 64>(p) : wkv7_of_values<T, 32>(p);
}

}  // namespace hybrid

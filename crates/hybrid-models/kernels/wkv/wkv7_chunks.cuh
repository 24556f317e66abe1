// RWKV-7's recurrence (Peng and others, arXiv 2503.14456) for prompts, in chunks of 16 tokens and matrix products.
//
// Of a head, with c(t) the removal key, b(t) what is added, S the state [keys][values] before the chunk, W(t) the product of the chunk's decays up to
// token t, M = W(7), and the rows
//
//     R(t) = r(t) o W(t) / M,   C(t) = c(t) o W(t - 1) / M,   K(s) = k(s) o M / W(s),   B(s) = b(s) o M / W(s),
//
// what the removal keys find, u(t) = -c(t)' S(t - 1), solves a triangular system, and with it all else is products:
//
//     U = -(I + C B')^-1 (C M S + (C K') V)   with C B' and C K' for s < t only
//     Y = R M S + (R K') V + (R B') U         for s <= t
//     S <- W(15) / M o (M S + K' V + B' U).
//
// RWKV-7 keeps at least e^-e^(-1/2) = 0.545 of a number at each token, so that W(t) / M lies within 2^-7 and 2^7, and f16 holds all rows, for bf16 inputs too.
//
// A block takes VALUES of a head's values through all tokens. Producers, warps that take every PRODUCERS-th chunk each, do all but the lines above; consumers
// go through all chunks, each with 16 columns of S in f32 registers. Consumers are what a block waits for (40 products a chunk, in the order of time), so
// that more producers than they need would but take their issue slots.
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

// Grid (2 for half a head's values in a block, 1 for all, heads, batch), WKV7_THREADS threads, dynamic shared memory as args.cuh says.
template <class T>
__device__ void wkv7_chunks(const Wkv7& p) {
    gridDim.x == 1 ? wkv7_of_values<T, 64>(p) : wkv7_of_values<T, 32>(p);
}

}  // namespace hybrid

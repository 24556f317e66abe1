// Instructions of compute capability 9.0: products of a warp group, and copies to all blocks of a
// cluster (PTX ISA, "Asynchronous warpgroup level matrix instructions", "cp.async.bulk" and
// "mbarrier"). Only code for sm_90a has all of them.
#pragma once
#include <type_traits>
#include "mma.cuh"

namespace hybrid {

// A matrix of 64 rows of 128 bytes in the layout of wgmma: piece i (16 bytes) of row r is stored at
// piece i xor r % 8.
template <class T>
using Square = T[64 * 64];
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 64 + ((piece ^ row % 8) * 8); }

// Returns the lower half of the descriptor of such a matrix. It counts units of 16 bytes: adding 2
// gives the next 16 columns, 128 the next 16 rows.
__device__ __forceinline__ uint32_t descriptor(const void* square) { return shared_address(square) >> 4 | 1u << 16; }

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_await() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Called after a wait: keeps the compiler from reading the sums earlier.
__device__ __forceinline__ void arrived(float (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// d <- a b (+ d). a is 64 x 16, in the registers of a warp group, in the layout of A of m16n8k16
// with 16 rows per warp. b is 16 x 64, in shared memory. d has the layout of C of m16n8k16, 16 rows
// per warp. ROWS: b's rows are the rows of the matrix in memory; otherwise they are its columns.
#define WGMMA(kind)                                                                                                                 \
    asm volatile(                                                                                                                   \
        "{.reg .pred add; .reg .b64 b; setp.ne.b32 add, %37, 0; mov.b64 b, {%36, 0x40000040};\n"                                    \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." kind "." kind                                                                 \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
        " {%32,%33,%34,%35}, b, add, 1, 1, %38;}"                                                                                   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),    \
          "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),       \
          "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),       \
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add), "n"(ROWS))
template <class T, bool ROWS>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint32_t b, bool add) {
    if constexpr (std::is_same<T, __half>::value) WGMMA("f16");
    else WGMMA("bf16");
}
#undef WGMMA
// Copies 4 bytes from global to shared memory. Only the first `bytes` are read.
__device__ __forceinline__ void copy4(void* to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// Stores four 8x8 matrices to rows of shared memory, each transposed. Lane i gives the address of
// row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// Called between stores to shared memory and a barrier after which wgmma reads them.
__device__ __forceinline__ void share_with_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Called after barriers are initialised, before other blocks of the cluster use them.
__device__ __forceinline__ void share_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives once, and announces `bytes` bytes.
__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Arrives at the barrier at the same address in another block of the cluster.
__device__ __forceinline__ void arrive_in(uint64_t* barrier, int block) {
    asm volatile(
        "{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}
// Copies to the same address in all blocks of the mask. The barrier at the same address in each
// block counts the bytes.
__device__ __forceinline__ void copy_to_blocks(void* to, const void* from, int bytes, uint64_t* barrier, uint16_t mask) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(mask)
                 : "memory");
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace hybrid

// Thin wrappers of instructions for tensor cores and asynchronous copies (PTX ISA, "Warp-level
// matrix instructions").
//
// Fragments of m16n8k16, with row = lane / 4 and pair = 2 (lane % 4):
//
// - A: {(row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8)}, two adjacent elements
//   along k each
// - B: {(pair, row), (pair + 8, row)}, two adjacent elements along k each
// - C: (row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1)
#pragma once
#include <cstdint>
#include "number.cuh"

namespace hybrid {

// Rows of shared matrices are padded by 16 bytes, so that eight rows are in different banks.
constexpr int PAD = 8;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies 16 bytes from global to shared memory, or zeros if not `valid`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Initialises a barrier in shared memory for `count` arrivals. The parity of its phases is 0, 1, 0,
// ... A thread that waits for a phase sees all writes before the phase's arrivals.
__device__ __forceinline__ void set_barrier(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive_at(uint64_t* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void await_barrier(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define AWAIT "mbarrier.try_wait.parity.shared.b64"  // Sleeps
#else
#define AWAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; " AWAIT " p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
#undef AWAIT
}

// Loads four 8x8 matrices of 16-bit elements. Lane i gives the shared address of row i % 8 of
// matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) { load_matrices(x, shared_address(row)); }
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], const void* row) { load_transposed(x, shared_address(row)); }

// Transposes an 8x8 matrix of 16-bit elements. Each lane has two adjacent elements of a row.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace hybrid

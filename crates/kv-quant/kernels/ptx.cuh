// Wrappers of the PTX instructions that the kernels use.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <type_traits>

namespace kvq {

constexpr unsigned FULL = 0xffffffffu;

// c += a b, with a 16x16 (row-major) and b 16x8 (column-major) in f16, and c 16x8 in f32. Lane 4g+t
// holds: of a, rows g and g+8, columns 2t, 2t+1, 2t+8 and 2t+9; of b, column g, rows 2t, 2t+1, 2t+8
// and 2t+9; of c, rows g and g+8, columns 2t and 2t+1.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with pairs of f16 or bf16.
template <class Pair>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<Pair, __half2>) {
        mma(c, a, b0, b1);
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Transposes an 8x8 matrix of f16. Lane 4g+t holds row g, columns 2t and 2t+1.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Loads four 8x8 matrices of f16. Lane l gives the address of row l % 8 of matrix l / 8. Lane 4g+t
// gets row g, columns 2t and 2t+1 of each; if TRANSPOSED, column g, rows 2t and 2t+1.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}

// Starts copying 16 bytes from global to shared memory.
__device__ __forceinline__ void copy16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed groups of copies are incomplete.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Selects four bytes of a (0 to 3) and b (4 to 7), by the four lower 4-bit digits of `places`.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t places) {
    uint32_t x;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(places));
    return x;
}

__device__ __forceinline__ uint4 load16(const unsigned char* p) { return *reinterpret_cast<const uint4*>(p); }

__device__ __forceinline__ uint32_t bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 x) { return *reinterpret_cast<uint32_t*>(&x); }

// Converts two bf16 to f16; numbers beyond f16's range become infinities.
__device__ __forceinline__ uint32_t f16_of_bf16(uint32_t x) {
    return bits(__float22half2_rn(__bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x))));
}

__device__ __forceinline__ __half2 half2_of(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) { return bits(__hmul2(half2_of(a), half2_of(b))); }

}  // namespace kvq

// Instructions of compute capability 9.0a: wgmma, mbarriers and copies by tensor maps (PTX ISA:
// "Asynchronous warpgroup level matrix instructions", "mbarrier", "cp.async.bulk.tensor").
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

__device__ __forceinline__ uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- mbarriers ----

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}
// Orders the initialisation of barriers before their use by the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "wait: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra wait;}" ::"r"(smem_address(barrier)),
        "r"(parity)
        : "memory");
}
// Barrier `id` for `threads` threads, including those that only arrive.
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- Copies from global to shared memory by a tensor map ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(smem_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(smem_address(barrier))
        : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma ----

// Orders ordinary writes to shared memory before reads by wgmma. Each writing thread calls it
// before a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving register accesses over a wait or a fence.
template <int L>
__device__ __forceinline__ void pin(float (&x)[L]) {
#pragma unroll
    for (int i = 0; i < L; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// Returns the descriptor of a matrix in shared memory. It has columns of 64 elements: [columns /
// 64][rows][64], rows of 128 bytes. Piece i (16 bytes) of row r is stored at piece i xor r % 8, as
// a tensor map with CU_TENSOR_MAP_SWIZZLE_128B writes it. The descriptor's stride byte offset is
// the size of 8 rows. Its leading byte offset is the size of 64 columns, and is read only if rows
// are the summed dimension.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* matrix, int leading_bytes) {
    const uint32_t low = (smem_address(matrix) & 0x3ffff) >> 4 | uint32_t(leading_bytes >> 4) << 16;
    return uint64_t(0x40000040) << 32 | low;
}

// Products of a warp group: d (64 x N, in registers) = a b, or d += a b if `add`. wgmma_ss: a and b
// are in shared memory, and their columns are the summed dimension. wgmma_rs: a is in registers, in
// the layout of mma.m16n8k16; b is in shared memory, and its rows are the summed dimension.
#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS_4 SUMS4(0)
#define SUMS_8 SUMS_4, SUMS4(4)
#define SUMS_16 SUMS16(0)
#define SUMS_32 SUMS16(0), SUMS16(16)
#define SUMS_40 SUMS_32, SUMS4(32), SUMS4(36)
#define SUMS_48 SUMS_40, SUMS4(40), SUMS4(44)
#define SUMS_64 SUMS_48, SUMS16(48)
#define SUMS_96 SUMS_64, SUMS16(64), SUMS16(80)
#define SUMS_128 SUMS_96, SUMS16(96), SUMS16(112)
#define REGS4 "%0,%1,%2,%3"
#define REGS8 REGS4 ",%4,%5,%6,%7"
#define REGS16 REGS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGS32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS40 REGS32 "," \
    "%32,%33,%34,%35,%36,%37,%38,%39"
#define REGS48 REGS40 "," \
    "%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS64 REGS48 "," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS96 REGS64 "," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define REGS128 REGS96 "," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define WGMMA_SS(N, REGS, A, B, ADD, SUMS, TYPE)                                                       \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %" #ADD ", 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS "}, %" #A    \
                 ", %" #B ", add, 1, 1, 0, 0;}"                                                        \
                 : SUMS                                                                                \
                 : "l"(a), "l"(b), "r"(int(add)))
#define WGMMA_RS(N, REGS, A0, A1, A2, A3, B, ADD, SUMS, TYPE)                                          \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %" #ADD ", 0;\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS "}, {%" #A0  \
                 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", add, 1, 1, 1;}"                               \
                 : SUMS                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

template <class T, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    constexpr bool f16 = std::is_same<T, __half>::value;
    if constexpr (N == 8 && f16) WGMMA_SS(8, REGS4, 4, 5, 6, SUMS_4, "f16");
    if constexpr (N == 8 && !f16) WGMMA_SS(8, REGS4, 4, 5, 6, SUMS_4, "bf16");
    if constexpr (N == 16 && f16) WGMMA_SS(16, REGS8, 8, 9, 10, SUMS_8, "f16");
    if constexpr (N == 16 && !f16) WGMMA_SS(16, REGS8, 8, 9, 10, SUMS_8, "bf16");
    if constexpr (N == 32 && f16) WGMMA_SS(32, REGS16, 16, 17, 18, SUMS_16, "f16");
    if constexpr (N == 32 && !f16) WGMMA_SS(32, REGS16, 16, 17, 18, SUMS_16, "bf16");
    if constexpr (N == 64 && f16) WGMMA_SS(64, REGS32, 32, 33, 34, SUMS_32, "f16");
    if constexpr (N == 64 && !f16) WGMMA_SS(64, REGS32, 32, 33, 34, SUMS_32, "bf16");
    if constexpr (N == 128 && f16) WGMMA_SS(128, REGS64, 64, 65, 66, SUMS_64, "f16");
    if constexpr (N == 128 && !f16) WGMMA_SS(128, REGS64, 64, 65, 66, SUMS_64, "bf16");
}

template <class T, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    constexpr bool f16 = std::is_same<T, __half>::value;
    if constexpr (N == 64 && f16) WGMMA_RS(64, REGS32, 32, 33, 34, 35, 36, 37, SUMS_32, "f16");
    if constexpr (N == 64 && !f16) WGMMA_RS(64, REGS32, 32, 33, 34, 35, 36, 37, SUMS_32, "bf16");
    if constexpr (N == 80 && f16) WGMMA_RS(80, REGS40, 40, 41, 42, 43, 44, 45, SUMS_40, "f16");
    if constexpr (N == 80 && !f16) WGMMA_RS(80, REGS40, 40, 41, 42, 43, 44, 45, SUMS_40, "bf16");
    if constexpr (N == 96 && f16) WGMMA_RS(96, REGS48, 48, 49, 50, 51, 52, 53, SUMS_48, "f16");
    if constexpr (N == 96 && !f16) WGMMA_RS(96, REGS48, 48, 49, 50, 51, 52, 53, SUMS_48, "bf16");
    if constexpr (N == 128 && f16) WGMMA_RS(128, REGS64, 64, 65, 66, 67, 68, 69, SUMS_64, "f16");
    if constexpr (N == 128 && !f16) WGMMA_RS(128, REGS64, 64, 65, 66, 67, 68, 69, SUMS_64, "bf16");
    if constexpr (N == 192 && f16) WGMMA_RS(192, REGS96, 96, 97, 98, 99, 100, 101, SUMS_96, "f16");
    if constexpr (N == 192 && !f16) WGMMA_RS(192, REGS96, 96, 97, 98, 99, 100, 101, SUMS_96, "bf16");
    if constexpr (N == 256 && f16) WGMMA_RS(256, REGS128, 128, 129, 130, 131, 132, 133, SUMS_128, "f16");
    if constexpr (N == 256 && !f16) WGMMA_RS(256, REGS128, 128, 129, 130, 131, 132, 133, SUMS_128, "bf16");
}

#include "wkv/wkv.cuh"
#include "wkv/wkv_generic.cuh"
#include "wkv/wkv4.cuh"
#include "wkv/wkv7.cuh"
#include "wkv/wkv7_chunks.cuh"

namespace hybrid {
static_assert(sizeof(WkvConstants<__half, false>) == WKV_SHARED && sizeof(WkvConstants<__half, true>) <= WKV_SHARED, "as args.cuh says");
static_assert(sizeof(WkvStage<__half, true>) == WKV_PRODUCER_SHARED && sizeof(WkvStage<__half, false>) <= WKV_PRODUCER_SHARED, "as args.cuh says");
static_assert(sizeof(Wkv7Shared<__half, WKV7_DIM>) == WKV7_SHARED && sizeof(Wkv7Shared<__half, WKV7_DIM / 2>) == WKV7_HALF_SHARED, "as args.cuh says");
ENTRIES(wkv4, (WKV4_THREADS), wkv4, Wkv4)
ENTRY(wkv5, (WKV_THREADS), wkv5, Wkv, f16, __half)
ENTRY(wkv5, (WKV_THREADS), wkv5, Wkv, bf16, __nv_bfloat16)
ENTRIES(wkv5_generic, (COLUMN_THREADS), wkv5_generic, Wkv)
ENTRY(wkv6, (WKV_THREADS), wkv6, Wkv, f16, __half)
ENTRY(wkv6, (WKV_THREADS), wkv6, Wkv, bf16, __nv_bfloat16)
ENTRIES(wkv6_generic, (COLUMN_THREADS), wkv6_generic, Wkv)
ENTRY(wkv7, (WKV7_THREADS), wkv7_chunks, Wkv7, f16, __half)
ENTRY(wkv7, (WKV7_THREADS), wkv7_chunks, Wkv7, bf16, __nv_bfloat16)
ENTRY(wkv7, (DELTA_THREADS), wkv7, Wkv7, f32, float)
ENTRIES(wkv7_generic, (COLUMN_THREADS), wkv7_generic, Wkv7)
}

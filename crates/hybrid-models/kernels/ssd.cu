#include "ssd.cuh"
#include "ssd_any.cuh"

namespace hybrid {
static_assert(sizeof(SsdShared<__half, 128>) == SSD_SHARED_128 && sizeof(SsdShared<__half, 64>) == SSD_SHARED_64, "as args.cuh says");
ENTRY(ssd, (SSD_THREADS, 2), ssd, Ssd, f16, __half)
ENTRY(ssd, (SSD_THREADS, 2), ssd, Ssd, bf16, __nv_bfloat16)
ENTRIES(ssd_any, (COLUMN_THREADS), ssd_any, Ssd)
}

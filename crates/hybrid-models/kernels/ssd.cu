#include "ssd_any.cuh"

namespace hybrid {
ENTRY(ssd, COLUMN_THREADS, ssd_any, Ssd, f16, __half)
ENTRY(ssd, COLUMN_THREADS, ssd_any, Ssd, bf16, __nv_bfloat16)
ENTRIES(ssd_any, COLUMN_THREADS, ssd_any, Ssd)
}

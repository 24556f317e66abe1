#include "rows.cuh"

namespace hybrid {
ENTRIES(rows_norm, (NORM_THREADS), norm_rows, NormRows)
ENTRIES(rows_shift, (SHIFT_THREADS), shift, Shift)
ENTRIES(rows_head_norm, (HEAD_NORM_THREADS), head_norm, HeadNorm)
ENTRIES(rows_gated_norm, (NORM_THREADS), gated_norm, GatedNorm)
}  // namespace hybrid

#include "rows/norm.cuh"
#include "rows/head_norm.cuh"
#include "rows/shift.cuh"
#include "rows/gate.cuh"

namespace hybrid {
ENTRIES(rows_norm, (NORM_THREADS), norm, Norm)
ENTRIES(rows_norm_wide, (NORM_THREADS), norm_wide, Norm)
ENTRIES(rows_gated_norm, (NORM_THREADS), gated_norm, GatedNorm)
ENTRIES(rows_head_norm, (HEAD_NORM_THREADS), head_norm, HeadNorm)
ENTRIES(rows_shift, (SHIFT_THREADS), shift, Shift)
ENTRIES(rows_gate, (GATE_THREADS), gate, Gate)
ENTRIES(rows_blend, (GATE_THREADS), blend, Blend)
ENTRIES(rows_bias, (GATE_THREADS), bias, Bias)
}  // namespace hybrid

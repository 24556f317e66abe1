#include "format_kernels.cuh"

TOKENS(e4m3, E4m3)
TOKENS(e5m2, E5m2)
TOKENS(e4m3_fixed, E4m3Fixed)
TOKENS(e5m2_fixed, E5m2Fixed)

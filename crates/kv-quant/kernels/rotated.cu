#include "format_kernels.cuh"

TOKENS(signed4, Signed4)
TOKENS(signed3, Signed3)
TOKENS(whole4, Whole4)
TOKENS(whole3, Whole3)
